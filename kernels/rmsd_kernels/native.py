"""Load the library of CPU ops that csrc/ builds. `heads.native_rows` and `video.native_patches` call the ops.

The library is optional: a wheel that was built without a C++ compiler does not contain it. This module never falls back
silently. Callers check `available()` and log which implementation runs, or call an op and get a RuntimeError with the
reason.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.abi3.so")
OLDEST_TORCH = (2, 11)
BUILD = "run `RMSD_FAST_NATIVE=1 pip install --no-build-isolation --no-deps -e .` in the source folder"

_LOCK = threading.Lock()


def _load() -> str:
    """Load the library once. Return "" or the reason why it is not available."""
    with _LOCK:
        return _load_once()


@functools.cache
def _load_once() -> str:
    if not LIBRARY.is_file():
        return f"{LIBRARY} was not built (no C++ compiler or no torch at build time); install g++ and {BUILD}"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        return f"{LIBRARY} needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, got {torch.__version__}; upgrade torch"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} could not be loaded ({error}); rebuild it for this machine and this torch"
    ops = torch.ops.rmsd_kernels
    if not hasattr(ops, "video_patches") or "tis_cap" not in str(ops.row_policy_.default._schema):
        return f"{LIBRARY} was built from an older version of csrc/; {BUILD}"
    torch.library.register_fake("rmsd_kernels::row_score", _head_stats_fake)
    torch.library.register_fake("rmsd_kernels::row_policy_", _head_stats_fake)
    torch.library.register_fake("rmsd_kernels::row_gradient_", lambda *arguments: None)
    torch.library.register_fake("rmsd_kernels::row_divergence_", _row_divergence_fake)
    torch.library.register_fake("rmsd_kernels::resize_frames_", lambda out, frames: None)
    torch.library.register_fake("rmsd_kernels::video_patches", _video_patches_fake)
    return ""


def _head_stats_fake(
    logits: Tensor,
    targets: Tensor,
    target_logit: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ref_logits: Tensor | None,
    *unused: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logp, entropy and lse [n], and full_kl [n], or [0] without a reference."""
    logp, entropy, lse = (target_logit.new_empty(logits.shape[0]) for _ in range(3))
    return logp, entropy, lse, target_logit.new_empty(0 if ref_logits is None else logits.shape[0])


def _row_divergence_fake(logits: Tensor, *unused: Tensor | float | None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _video_patches_fake(
    frames: Tensor,
    height: int,
    width: int,
    patch: int,
    temporal: int,
    merge: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    groups = (frames.shape[0] + temporal - 1) // temporal
    shape = (groups * (height // patch) * (width // patch), frames.shape[1] * temporal * patch * patch)
    return frames.new_empty(shape, dtype=dtype)


def available() -> bool:
    """Return whether the compiled ops can be called in this process. The first call loads the library."""
    return _load() == ""


def why_not() -> str:
    """Return "" if the ops are available, otherwise the reason and what to do about it."""
    return _load()
