"""The compiled CPU ops of csrc/: loading, whether they are there, and their checked Python forms.

The library is optional: a wheel built without a C++ compiler lacks it. Nothing here falls back by itself; callers ask
`available()` and say in their log which path runs, or call an op and get a RuntimeError that says why it is missing.

`row_logprob`: one pass over the logits: T*V*itemsize bytes of logits and 12*T of vectors read, 8*T written.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.abi3.so")
OLDEST_TORCH = (2, 11)


@functools.cache
def _load() -> str:
    """Load the library once. Returns "" or the reason why it is not there."""
    if not LIBRARY.is_file():
        return (
            f"{LIBRARY} was not built (no C++ compiler or no torch at build time); install g++ and run "
            "`RMSD_FAST_NATIVE=1 pip install --no-build-isolation --no-deps -e .` in the source folder"
        )
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        return f"torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} is needed by {LIBRARY}, found {torch.__version__}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} could not be loaded ({error}); rebuild it for this machine and this torch"
    torch.library.register_fake("rmsd_kernels::row_logprob", _row_logprob_fake)
    return ""


def _row_logprob_fake(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return temperature.new_empty(temperature.shape), temperature.new_empty(temperature.shape)


def available() -> bool:
    """Whether the compiled ops can be called in this process. Loads the library on the first call."""
    return _load() == ""


def why_not() -> str:
    """Empty when the ops are available, else the reason and what to do about it."""
    return _load()


def row_logprob(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and entropy of each row, in one pass, without a gradient.

    Same as: logp_all = (logits.float() / temperature[:, None]).log_softmax(-1); logp = logp_all at targets,
    entropy = -(logp_all.exp() * logp_all).sum(-1). Rows may be strided; logits strided within a row are copied.
    A row that holds NaN or +inf, or nothing but -inf, gives NaN, as torch does; single -inf logits are plain masking,
    and there the entropy counts them as 0.

    Args:
        logits: [T, V], float32 or bfloat16, on CPU.
        targets: [T], int64, in [0, V).
        temperature: [T] float32, or one number for all rows; finite and positive.
    Returns:
        (logp [T] float32, in nats, at most 0; entropy [T] float32, in nats).
    Raises:
        RuntimeError: the library is not there (see why_not), logits are not on CPU, or a gradient would be needed.
        TypeError: a dtype differs. ValueError: a shape, a target or a temperature is out of its range.
    Source: online log-sum-exp, Milakov and Gimelshein (arXiv 1805.02867), carried over to the entropy.
    """
    if _load():
        raise RuntimeError(f"row_logprob: native ops are not available: {_load()}")
    if not isinstance(temperature, Tensor):
        temperature = torch.full(targets.shape, float(temperature), dtype=torch.float32, device=targets.device)
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"row_logprob: logits: expected float32 or bfloat16, got {logits.dtype}; convert it first")
    if targets.dtype != torch.int64:
        raise TypeError(f"row_logprob: targets: expected int64, got {targets.dtype}; convert it first")
    if temperature.dtype != torch.float32:
        raise TypeError(f"row_logprob: temperature: expected float32, got {temperature.dtype}; convert it first")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"row_logprob: logits: expected shape [T, V] with V >= 1, got {list(logits.shape)}")
    for name, vector in (("targets", targets), ("temperature", temperature)):
        if vector.shape != logits.shape[:1]:
            raise ValueError(f"row_logprob: {name}: expected shape [{logits.shape[0]}], got {list(vector.shape)}")
    if not (logits.device == targets.device == temperature.device) or logits.device.type not in ("cpu", "meta"):
        devices = f"{logits.device}, {targets.device}, {temperature.device}"
        raise RuntimeError(f"row_logprob: expected all inputs on CPU, got {devices}; move them, or use impl='torch'")
    if torch.is_grad_enabled() and (logits.requires_grad or temperature.requires_grad):
        raise RuntimeError("row_logprob has no gradient; call it under torch.no_grad(), or use the torch form to train")
    try:
        return torch.ops.rmsd_kernels.row_logprob(logits, targets, temperature)
    except RuntimeError as error:
        # The op reports values (a target or a temperature out of range) through the only error type its ABI has.
        message = str(error)
        if "row_logprob: targets[" in message or "row_logprob: temperature[" in message:
            raise ValueError(message[message.rindex("row_logprob: t") :].splitlines()[0]) from None
        raise


def why_not_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None
) -> str:
    """Why the compiled CPU op cannot score this call; empty where it can."""
    if hidden.device.type != "cpu" or hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on CPU, got {hidden.dtype} on {hidden.device}"
    if bias is not None or softcap is not None:
        return "it has no bias and no softcap"
    inputs = [t for t in (hidden, weight, temperature) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "it has no gradient, and an input needs one"
    return why_not()


@torch.no_grad()
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    memory_budget_bytes: int,
) -> tuple[Tensor, Tensor]:
    """(logp [T], entropy [T]): a GEMM in the input's dtype, then one pass over its rows; no copy of the logits."""
    keep = torch.nonzero(targets != ignore_index).flatten()
    scale = torch.as_tensor(temperature, dtype=torch.float32).expand(len(targets))
    logp, entropy = torch.zeros(len(targets)), torch.zeros(len(targets))
    for rows in keep.split(max(1, int(memory_budget_bytes // (weight.shape[0] * weight.element_size())))):
        logits = F.linear(hidden[rows], weight)
        logp[rows], entropy[rows] = row_logprob(logits, targets[rows], scale[rows])
    return logp, entropy
