"""Triton implementation of `merge.merge_` for CUDA tensors: one kernel reads both parts once and writes the result.

One program processes several heads of one row. Arithmetic is float32, and the result is rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import device_of

HEADS = 8
WARPS = 4
# These are slices of longer tensors. Without this, the kernel would be recompiled for every alignment.
SLICED = ["lse_ptr", "other_lse_ptr"]


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _merge_kernel(
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    out_row,
    out_head,
    lse_row,
    lse_head,
    other_row,
    other_head,
    other_lse_row,
    other_lse_head,
    heads,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    head = head.to(tl.int64)
    lse_address = lse_ptr + row * lse_row + head * lse_head
    lse = tl.load(lse_address, mask=inside, other=0.0)
    other_lse = tl.load(other_lse_ptr + row * other_lse_row + head * other_lse_head, mask=inside, other=0.0)
    weight = 1.0 / (1.0 + tl.exp(lse - other_lse))
    own_weight = 1.0 / (1.0 + tl.exp(other_lse - lse))
    col = tl.arange(0, DIM)
    mask = inside[:, None] & (col < dim)[None, :]
    out_address = out_ptr + row * out_row + head[:, None] * out_head + col[None, :]
    other_address = other_ptr + row * other_row + head[:, None] * other_head + col[None, :]
    out = tl.load(out_address, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_address, mask=mask, other=0.0).to(tl.float32)
    merged = out * own_weight[:, None] + other * weight[:, None]
    tl.store(out_address, merged.to(out_ptr.dtype.element_ty), mask=mask)
    high = tl.maximum(lse, other_lse)
    # If both are -inf, their difference would be NaN.
    distance = tl.where(lse == other_lse, 0.0, -tl.abs(lse - other_lse))
    # Threads that hold other heads have read lse for their weights before it is overwritten.
    tl.debug_barrier()
    tl.store(lse_address, high + tl.log(1.0 + tl.exp(distance)), mask=inside)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge as merge.merge_, for float32 lse; the last axis of out and other has stride 1. `other` is only read."""
    rows, heads, dim = out.shape
    if not out.numel():
        return
    strides = (*out.stride()[:2], lse.stride(1), lse.stride(0), *other.stride()[:2])
    strides += (other_lse.stride(1), other_lse.stride(0))
    grid = (rows, triton.cdiv(heads, HEADS))
    with device_of(out):
        _merge_kernel[grid](
            out, lse, other, other_lse, *strides, heads, dim, HEADS=HEADS, DIM=triton.next_power_of_2(dim),
            num_warps=WARPS,
        )  # fmt: skip
