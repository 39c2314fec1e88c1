"""What all ops share: the dtype of their sums, and their bounds towards autocast and second derivatives."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """dtype of everything after the GEMM, and of results."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(op: Callable) -> Callable:
    """An op that computes in the dtypes it is given: autocast would send some of its GEMMs to another one."""

    @functools.wraps(op)
    def run(tensor: Tensor, *arguments):
        with torch.autocast(tensor.device.type, enabled=False):
            return op(tensor, *arguments)

    return run


def first_order(backward: Callable) -> Callable:
    """A backward whose result must not be differentiated: it is a constant to autograd, so terms would be lost."""

    @functools.wraps(backward)
    def run(ctx, *gradients):
        # Autograd records a backward exactly where create_graph asks for it; a trace for torch.compile always does.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused losses have no second derivatives (create_graph=True); use impl='reference' for these"
            )
        return backward(ctx, *gradients)

    return run
