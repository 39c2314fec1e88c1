"""Launch the Triton row kernels: the recorded configuration, and argument checks that do not wait for the device."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# A thread makes two 16-byte loads before it uses them, so that 32 warps have 32 KB in flight, about what the memory
# latency requires. One program of 32 warps fills an SM. The 132 rows in progress, 304 KB each (151936 16-bit logits),
# are 40 MB and fit the 50 MB L2 of an H200, so the second pass does not read memory. With a bias or a softcap, there
# are registers for only one load. If two rows are read at a time, a program has half the threads, each with twice the
# registers. These numbers are calculated from the compiler's register counts and have not been measured.
LOAD_BYTES = 16
LOADS = 2
REGISTERS_OF_AN_SM = 65536
WARPS = 32
WARPS_OF_TWO_ROWS = 16
# With 1 stage, loads go directly to registers. More stages would use shared memory, with a barrier per block.
STAGES = 1
# Per-row vectors may be slices of longer vectors. Without this, the kernel would be recompiled for every alignment.
SLICED = [
    "targets_ptr",
    "target_logit_ptr",
    "temperature_ptr",
    "ref_lse_ptr",
    "ref_logp_ptr",
    "logp_ptr",
    "entropy_ptr",
    "lse_ptr",
    "full_kl_ptr",
    "scale_ptr",
    "advantage_ptr",
    "old_logp_ptr",
    "kl_ref_logp_ptr",
    "rollout_logp_ptr",
    "g_logp_ptr",
    "g_entropy_ptr",
    "g_full_kl_ptr",
    "value_ptr",
    "logit_ptr",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowLaunch(NamedTuple):
    """The launch configuration of a row kernel.

    Without a limit on registers, the compiler spills two or three of them to make room for a second program per SM.
    """

    block: int  # columns that a program processes at a time
    lane: int  # columns of one thread's load
    warps: int  # per program
    registers: int  # per thread, at most


def row_launch(vocab: int, itemsize: int, *, plain: bool = True, two_rows: bool = False) -> RowLaunch:
    """Return the recorded configuration for rows of `vocab` logits. plain: without bias and softcap."""
    warps = WARPS_OF_TWO_ROWS if two_rows else WARPS
    lane = LOAD_BYTES // itemsize
    loads = LOADS if plain and not two_rows else 1
    block = min(32 * warps * lane * loads, max(16, triton.next_power_of_2(vocab)))
    return RowLaunch(block, lane, warps, REGISTERS_OF_AN_SM // (32 * warps))


def launch(
    kernel: Any, logits: Tensor, arguments: dict[str, Any], *, plain: bool = True, two_rows: bool = False
) -> None:
    """Launch kernel with one program per row of logits."""
    block, lane, warps, registers = row_launch(logits.shape[1], logits.element_size(), plain=plain, two_rows=two_rows)
    options = {"num_warps": warps, "maxnreg": registers}
    with device_of(logits):
        kernel[(len(logits),)](**arguments, BLOCK=block, LANE=lane, STAGES=STAGES, **options)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which Triton launches on the tensor's device, not on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def check_logits(name: str, logits: Tensor, like: Tensor | None) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {logits.dtype}")
    if like is not None and logits.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"{name}: expected rows without gaps, got strides {logits.stride()}")


def row_vectors(logits: Tensor, **vectors: Tensor | None) -> dict[str, Tensor | None]:
    """Check for float32 vectors with one number per row of logits, and return them contiguous; None stays None."""
    for name, vector in vectors.items():
        if vector is not None and vector.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {vector.dtype}")
        if vector is not None and vector.shape != logits.shape[:1]:
            raise ValueError(f"{name}: expected shape [{len(logits)}], got {list(vector.shape)}")
    return {name: None if vector is None else vector.contiguous() for name, vector in vectors.items()}
