"""Which implementation serves a call. `auto` never trades a compiled path for a slow one without saying so: on CUDA a
missing triton is an error; on CPU, where the library of csrc/ was not built, the torch loop gives the same numbers, and
`native.why_not()` says why."""

import importlib.util
import os

import torch
from torch import Tensor

from . import native

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# The interpreter runs the kernels on CPU tensors; triton reads the variable when it is imported.
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
    """One of IMPLEMENTATIONS for a call on `tensor`; RuntimeError where the asked one cannot serve it.

    native_form: whether the function has a form in csrc/.
    triton_dtypes, native_dtypes: what its compiled forms take.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if impl == "auto" and device == "cuda" and dtype != torch.float64:
        reason = _why_not_triton(device, dtype, triton_dtypes)
        if reason:
            raise RuntimeError(f"impl='auto' means triton for CUDA tensors, but {reason}; or ask for impl='torch'")
        return "triton"
    if impl == "auto":
        return "native" if native_form and not _why_not_native(device, dtype, native_dtypes) else "torch"
    reason = ""
    if impl == "triton":
        reason = _why_not_triton(device, dtype, triton_dtypes)
    elif impl == "native":
        reason = _why_not_native(device, dtype, native_dtypes) if native_form else "this loss has no form in csrc/"
    if reason:
        raise RuntimeError(f"impl: {impl!r} cannot serve this call: {reason}; use 'auto' or 'torch'")
    return impl


def can_run_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return not _why_not_triton(tensor.device.type, tensor.dtype, TRITON_FLOATS)


def _why_not_triton(device: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton, in the version your torch names)"
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
