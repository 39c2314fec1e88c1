"""Attention over two sets of keys from the attention over each, and what every back end needs beside it."""

import importlib

import torch
from torch import Tensor

from ..implementations import can_run_triton


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Attention over two sets of keys from that over each, in place; `other` is used up.

    out, other: [R, H, d]; lse, other_lse: [H, R] in the accumulation dtype, in which the arithmetic is.
    """
    if lse.dtype == torch.float32 and can_run_triton(out) and out.stride(-1) == other.stride(-1) == 1:
        importlib.import_module(".triton_merge", __package__).merge_(out, lse, other, other_lse)
        return
    weight = torch.sigmoid(other_lse - lse).t().unsqueeze(-1)
    out.add_(other.to(lse.dtype).sub_(out).mul_(weight))
    lse.copy_(torch.logaddexp(lse, other_lse))


def adjacent(t: Tensor) -> Tensor:
    """t with neighbouring numbers in its last dimension, which the kernels take for granted; other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()
