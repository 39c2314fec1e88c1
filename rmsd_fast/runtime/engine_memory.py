"""Count the bytes of an engine's gradients, optimizer states and buffers, for each optimizer that DeepSpeed chooses.

`Engine` gives DeepSpeed one group of parameters and torch's AdamW. These are the tensors of DeepSpeed 0.19, with N
trained parameters, p processes, and buckets of B = min(N, LARGEST_BUCKET) elements:

- ZeRO-0, float32 (no wrapper): gradients of 4N. After the last backward, they are copied into one tensor for the sum
  over the processes.
- ZeRO-0, bfloat16 (FP16_UnfusedOptimizer): master weights of 4N, gradients of 2N, and in the step copies of 4N.
- ZeRO-1, bfloat16 (BF16_Optimizer): gradients of 4N that are never freed, and those of the last backward, 2N.
- ZeRO-1 and 2 otherwise (DeepSpeedZeroOptimizer): master weights in float32 even for float32 weights, all split.
  Gradients arrive in a bucket, and are then added to this process's part. In float32, the part of each backward is a
  tensor of its own, and the step copies the sum of all. In bfloat16, it is added to one tensor in float32.
- ZeRO-3: the same, with buffers that are never freed. Weights are counted by the caller.

AdamW has two moments of 4 bytes. On CPU it also makes two temporaries of the size of a tensor; on CUDA, and with
offloading, the fused kernel makes none. With `runtime.optimizer=adamw_8bit`, moments have a byte, and a float32 scale
per 256. bitsandbytes 0.50 updates them with one kernel on CUDA. On CPU it makes five float32 temporaries: both moments,
the gradient, and two for the denominator. Under ZeRO-0, parameters with less than 4,096 weights have float32 moments,
which are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmsd_fast.runtime.engine import LARGEST_BUCKET

# Most elements that DeepSpeed copies into one tensor to sum gradients under ZeRO-0 and ZeRO-1 (bfloat16).
_LARGEST_SUM = 500_000_000


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one engine on one process's device, besides the weights of its module.

    Attributes:
        optimizer: master weights and moments, from the first step on.
        gradients: gradients that are held from the first backward of a step to its end.
        lasting: gradients that are held all the time.
        bucket: held in addition during a backward.
        reduction: held in addition to bucket at the end of a backward.
        step: held in addition to gradients in the optimizer step.
        host: master weights, moments and gradients in host memory.
    """

    optimizer: int = 0
    gradients: int = 0
    lasting: int = 0
    bucket: int = 0
    reduction: int = 0
    step: int = 0
    host: int = 0


def engine_memory(
    trained: int,
    largest: int,
    *,
    zero_stage: int,
    dtype: str,
    offload: bool,
    processes: int,
    device: str,
    optimizer: str = "adamw",
) -> EngineMemory:
    """Return the bytes of an engine.

    Args:
        trained: number of trained parameters, N.
        largest: elements of the largest trained parameter.
        zero_stage: 0 to 3.
        dtype: "bfloat16" or "float32".
        offload: `runtime.offload_optimizer`.
        processes: number of processes, p.
        device: "cuda" or "cpu".
        optimizer: `runtime.optimizer`, "adamw" or "adamw_8bit".
    """
    half = dtype == "bfloat16"
    width = 2 if half else 4
    bucket, summed = min(trained, LARGEST_BUCKET), min(trained, _LARGEST_SUM)
    part = -(-trained // processes)
    quantized = optimizer == "adamw_8bit"
    # Bytes per element of the tensor that is updated.
    updated = 0 if device != "cpu" or offload else 20 if quantized else 8
    if zero_stage == 0:
        # AdamW's temporaries are those of one parameter at a time.
        return EngineMemory(
            optimizer=(4 * trained if half else 0) + _moments(trained, quantized),
            gradients=width * trained,
            reduction=width * summed,
            step=(4 * trained if half else 0) + updated * largest,
        )
    temporary, states = updated * part, 4 * part + _moments(part, quantized)
    if zero_stage == 1 and half and not offload:
        return EngineMemory(
            optimizer=states,
            lasting=4 * trained,
            gradients=2 * trained,
            reduction=(4 + 2) * summed,
            step=temporary,
        )
    # A bucket is copied to be summed if it has slices for several processes, or sums in another dtype.
    copied = bucket if processes > 1 or half else 0
    if zero_stage == 1:
        # Gradients are added in float32.
        sizes = EngineMemory(
            gradients=4 * trained, bucket=4 * bucket, reduction=4 * (copied + part), step=max(4 * part, temporary)
        )
    elif zero_stage == 2 and half:
        sizes = EngineMemory(gradients=4 * part, bucket=2 * bucket, reduction=2 * copied + 4 * largest, step=temporary)
    elif zero_stage == 2:
        # The parts of this backward and of earlier ones; the step copies their sum.
        sizes = EngineMemory(
            gradients=4 * part, bucket=4 * bucket, reduction=4 * (copied + part), step=max(4 * part, temporary)
        )
    else:
        sizes = EngineMemory(lasting=4 * part + width * bucket, reduction=width * bucket, step=4 * part + temporary)
    if not offload:
        return replace(sizes, optimizer=states)
    # In host memory: master weights, moments, the gradient, and new weights in their own dtype. In float32, ZeRO-2 adds
    # gradients there, too. The device keeps room for one gradient.
    adds = zero_stage == 2 and not half
    return replace(
        sizes,
        gradients=0 if adds else sizes.gradients,
        bucket=sizes.bucket + width * largest,
        step=0,
        host=(12 + 4 + width + 4 * adds) * part,
    )


def _moments(elements: int, quantized: bool) -> int:
    return 2 * elements + 8 * -(-elements // 256) if quantized else 8 * elements
