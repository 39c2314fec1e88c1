"""Choose the kernels for the shared-prefix ops, and count their calls."""

import threading
from typing import Protocol

import torch
from torch import Tensor

from . import cuda, segments
from .layout import Layout

IMPLEMENTATIONS = ("auto", "flash", "torch")
_count = threading.local()


class Backend(Protocol):
    """Forward and backward on one packed row, and the two calls of a decode step. edges: the plan's int32 tensors."""

    def forward(self, q, k, v, layout: Layout, edges: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(self, d_out, q, k, v, out, lse, layout: Layout, edges: tuple[Tensor, ...], scale: float): ...

    def attend_own(self, q, k, v, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]: ...

    def attend_prefixes(
        self, q, k, v, prefixes: list[int], rows: list[int], edges: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, Tensor]: ...


def attention_calls() -> int:
    """Return how many times this thread has executed the forward of shared_prefix_attention and shared_prefix_decode.

    Calls are counted inside the op, so runs of compiled code are included and tracing is not.
    """
    return getattr(_count, "calls", 0)


def count_call() -> None:
    _count.calls = attention_calls() + 1


def backend_of(q: Tensor, impl: str) -> Backend:
    """Return the kernels for queries like q. Raise RuntimeError if impl is "flash" and no flash kernel fits."""
    if impl != "torch":
        reason = _why_not_flash(q)
        if not reason:
            return segments.CPU_FLASH if q.device.type == "cpu" else cuda.kernels_for(q)
        if impl == "flash":
            raise RuntimeError(f"impl: 'flash' does not support this call: {reason}; use 'auto' or 'torch'")
    return segments.EXPLICIT


def _why_not_flash(q: Tensor) -> str:
    device = q.device.type
    if device == "cuda":
        return cuda.why_not(q)
    if device != "cpu":
        return f"flash kernels exist for cpu and cuda only, got a tensor on {device}"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return "" if q.dtype in dtypes else f"the CPU flash kernel takes {', '.join(map(str, dtypes))}, got {q.dtype}"
