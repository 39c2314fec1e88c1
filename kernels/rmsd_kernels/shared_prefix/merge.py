"""Merge attention over two sets of keys, and provide a helper for strides that all back ends use."""

import importlib

import torch
from torch import Tensor

from ..implementations import can_run_triton


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, *, needs_lse: bool = True) -> None:
    """Merge attention over two sets of keys into out and lse, in place. `other` may be overwritten.

    Args:
        out: attention over the first set of keys, [R, H, d].
        lse: its log-sum-exp, [H, R], in the accumulation dtype, in which the merge is computed.
        other: attention over the second set of keys, [R, H, d].
        other_lse: its log-sum-exp, [H, R], dtype of lse.
        needs_lse: whether lse is read again. If not, it may be left as it was.
    """
    if lse.dtype == torch.float32 and can_run_triton(out) and out.stride(-1) == other.stride(-1) == 1:
        importlib.import_module(".triton_merge", __package__).merge_(out, lse, other, other_lse)
        return
    weight = torch.sigmoid(other_lse - lse).t().unsqueeze(-1)
    out.add_(other.to(lse.dtype).sub_(out).mul_(weight))
    if needs_lse:
        lse.copy_(torch.logaddexp(lse, other_lse))


def adjacent(t: Tensor) -> Tensor:
    """Return t with stride 1 in its last dimension, as the kernels require; other strides are arbitrary."""
    return t if t.stride(-1) == 1 else t.contiguous()
