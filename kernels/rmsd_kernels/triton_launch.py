"""How the Triton row kernels are launched: the recorded configuration and the checks that cost nothing."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

# 16 KB blocks, two on their way while a third is worked on, and 32 warps, which makes one program per SM: its 132 rows
# of 304 KB (V = 151936, 16 bit) are 40 MB and fit the 50 MB of an H200's L2, so that the second pass need not go to
# memory. This is arithmetic and the compiler's register counts, not a measurement.
BLOCK_BYTES = 16384
# Where two rows are read at a time: 8192 columns of 16 bit would spill registers (64 a thread are left at 32 warps).
COLUMNS_OF_TWO_ROWS = 4096
STAGES = 3
WARPS = 32
# Per-row vectors may be slices of longer ones: without this each alignment of them would be compiled anew.
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
    "g_logp_ptr",
    "g_entropy_ptr",
    "g_full_kl_ptr",
    "value_ptr",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_of(vocab: int, itemsize: int, two_rows: bool) -> int:
    """Columns that a program works on at a time."""
    block = min(BLOCK_BYTES // itemsize, COLUMNS_OF_TWO_ROWS if two_rows else BLOCK_BYTES)
    return min(block, max(16, triton.next_power_of_2(vocab)))


def launch(kernel: Any, logits: Tensor, arguments: list[Any], two_rows: bool) -> None:
    """kernel on one program per row of logits."""
    block = block_of(logits.shape[1], logits.element_size(), two_rows)
    with device_of(logits):
        kernel[(len(logits),)](*arguments, BLOCK=block, STAGES=STAGES, num_warps=WARPS)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
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


def row_vectors(logits: Tensor, **vectors: Tensor | None) -> list[Tensor | None]:
    """float32 vectors with one number per row of logits, without gaps; a None stays None."""
    for name, vector in vectors.items():
        if vector is not None and vector.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {vector.dtype}")
        if vector is not None and vector.shape != logits.shape[:1]:
            raise ValueError(f"{name}: expected shape [{len(logits)}], got {list(vector.shape)}")
    return [None if vector is None else vector.contiguous() for vector in vectors.values()]
