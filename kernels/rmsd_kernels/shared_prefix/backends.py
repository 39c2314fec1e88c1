"""Which kernels serve a call of the shared-prefix ops, and the count of these calls."""

import threading
from typing import Protocol

import torch
from torch import Tensor

from . import cuda, segments
from .layout import Layout

IMPLEMENTATIONS = ("auto", "flash", "torch")
_count = threading.local()


class Backend(Protocol):
    """Both directions on one packed row, and one decode step. edges: the plan's int32 tensors."""

    def forward(self, q, k, v, layout: Layout, edges: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(self, d_out, q, k, v, out, lse, layout: Layout, edges: tuple[Tensor, ...], scale: float): ...


def attention_calls() -> int:
    """How often this thread has executed shared_prefix_attention's or shared_prefix_decode's forward so far.

    Counted where the attention happens, so compiled code counts too, and tracing does not.
    """
    return getattr(_count, "calls", 0)


def count_call() -> None:
    _count.calls = attention_calls() + 1


def backend_of(q: Tensor, impl: str) -> Backend:
    """The kernels for queries like q; RuntimeError where impl="flash" has none."""
    if impl != "torch":
        reason = _why_not_flash(q)
        if not reason:
            return segments.CPU_FLASH if q.device.type == "cpu" else cuda.kernels_for(q)
        if impl == "flash":
            raise RuntimeError(f"impl: 'flash' cannot serve this call: {reason}; use 'auto' or 'torch'")
    return segments.EXPLICIT


def _why_not_flash(q: Tensor) -> str:
    device = q.device.type
    if device == "cuda":
        return cuda.why_not(q)
    if device != "cpu":
        return f"there are flash kernels for cpu and cuda, got a tensor on {device}"
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return "" if q.dtype in known else f"the CPU flash kernel takes {', '.join(map(str, known))}, got {q.dtype}"
