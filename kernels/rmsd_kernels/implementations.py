"""Choose the implementation for a call.

On CUDA, `auto` raises if triton is missing instead of falling back to slower code. On CPU, `auto` uses the torch loop,
which computes the same numbers, if the library of csrc/ was not built; `native.why_not()` returns the reason.
"""

import importlib.util
import os

import torch
from torch import Tensor

from . import native

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on CPU tensors. Triton reads this variable on import.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ("triton", "native", "torch", "reference")
TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_FLOATS = (torch.float32, torch.bfloat16)


def resolve_impl(
    impl: str,
    tensor: Tensor,
    *,
    native_form: bool = True,
    triton_dtypes: tuple[torch.dtype, ...] = TRITON_FLOATS,
    native_dtypes: tuple[torch.dtype, ...] = NATIVE_FLOATS,
) -> str:
    """Return the implementation, one of IMPLEMENTATIONS, for a call on `tensor`.

    Args:
        impl: the requested implementation, one of IMPLEMENTATIONS or "auto".
        tensor: an input of the call; its device and dtype determine the implementation.
        native_form: whether the function is implemented in csrc/.
        triton_dtypes: dtypes that its Triton kernels support.
        native_dtypes: dtypes that its ops in csrc/ support.
    Raises:
        RuntimeError: the requested implementation does not support the call.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if impl == "auto" and device == "cuda" and dtype != torch.float64:
        reason = _why_not_triton(device, dtype, triton_dtypes)
        if reason:
            raise RuntimeError(
                f"impl: 'auto' means 'triton' for CUDA tensors, which does not support this call: {reason}; "
                "or use impl='torch'"
            )
        return "triton"
    if impl == "auto":
        return "native" if native_form and not _why_not_native(device, dtype, native_dtypes) else "torch"
    reason = ""
    if impl == "triton":
        reason = _why_not_triton(device, dtype, triton_dtypes)
    elif impl == "native":
        reason = _why_not_native(device, dtype, native_dtypes) if native_form else "csrc/ does not implement this loss"
    if reason:
        raise RuntimeError(f"impl: {impl!r} does not support this call: {reason}; use 'auto' or 'torch'")
    return impl


def can_run_triton(tensor: Tensor) -> bool:
    """Return whether the Triton kernels support this tensor."""
    return not _why_not_triton(tensor.device.type, tensor.dtype, TRITON_FLOATS)


def _why_not_triton(device: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton, in the version that your torch requires)"
    if torch.version.hip:
        return "the kernels contain instructions of NVIDIA's GPUs, and this is a ROCm build of torch"
    if dtype not in dtypes:
        return f"the kernels take {_names(dtypes)}, got {dtype}"
    return "" if device == "cuda" or _INTERPRETED else f"the kernels run on CUDA, got a tensor on {device}"


def _why_not_native(device: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    if device != "cpu" or dtype not in dtypes:
        return f"the ops take {_names(dtypes)} on CPU, got {dtype} on {device}"
    return native.why_not()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} and {last}" if others else last
