"""Row back end on CPU: the functions of `torch_rows` with the compiled ops of csrc/, for float32 and bfloat16 logits.

Each function makes two passes over a row, which stays in the cache between them. Logits are read from memory once and
written at most once (n*V*itemsize bytes each). Sums are float32 within 512 columns and double across them. One thread
processes a row, so results do not depend on the number of threads. Rows may have any stride, but columns must be
adjacent. Vectors are contiguous float32; targets are int64. Nothing here is differentiable.

Raises (all functions):
    RuntimeError: the library is not available (see native.why_not), or a vector has the wrong shape, stride or dtype.
    TypeError: logits are neither float32 nor bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .row_types import PolicyTerms, RowInputs, RowReference, RowStats
from .torch_rows import into, target_logit

__all__ = ["divergence_", "gradient_", "policy_", "score", "target_logit"]

# The ops represent the names by these numbers.
KL_CODES = {"none": 0, "k1": 1, "k2": 2, "k3": 3, "full": 4}
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3}
DTYPES = (torch.float32, torch.bfloat16)


def score(
    logits: Tensor, inputs: RowInputs, ref: RowReference | None = None, *, out: RowStats | None = None
) -> RowStats:
    """Return RowStats of logits [n, V], in `out` if it is given. Logits are only read."""
    return _stats(_ops(logits).row_score(logits, **_head(inputs, ref)), ref, out)


def gradient_(
    logits: Tensor,
    inputs: RowInputs,
    stats: RowStats,
    g_logp: Tensor,
    g_entropy: Tensor | None = None,
    ref: RowReference | None = None,
    g_full_kl: Tensor | None = None,
) -> None:
    """Overwrite logits [n, V] with the gradient of g_logp*logp + g_entropy*entropy + g_full_kl*full_kl."""
    slopes = {"g_logp": g_logp, "g_entropy": g_entropy, "g_full_kl": g_full_kl}
    _ops(logits).row_gradient_(logits, **_head(inputs, ref), **stats._asdict(), **slopes)


def policy_(
    logits: Tensor,
    inputs: RowInputs,
    terms: PolicyTerms,
    ref: RowReference | None = None,
    *,
    out: RowStats | None = None,
) -> RowStats:
    """Return RowStats of logits [n, V] and overwrite logits with the gradient of the rows' summed policy losses."""
    settings = terms.settings
    values = _ops(logits).row_policy_(
        logits,
        **_head(inputs, ref),
        scale=terms.scale,
        advantage=terms.advantage,
        old_logp=terms.old_logp,
        policy_ref_logp=terms.ref_logp,
        rollout_logp=terms.rollout_logp,
        kl=_code(KL_CODES, "kl", settings.kl_loss),
        kl_coef=settings.kl_coef,
        kl_log_ratio_clip=settings.kl_log_ratio_clip,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        tis_cap=settings.tis_cap,
        entropy_coef=settings.entropy_coef,
    )
    return _stats(values, ref, out)


def divergence_(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor | None,
) -> Tensor:
    """Return the divergence [n] between teacher and student; kinds as in linear_divergence.

    With scale [n], overwrite logits with the gradient of the sum of scale * divergence; without it, only read them.
    Teacher logits that are neither float32 nor bfloat16 are copied to float32.
    """
    code = _code(DIVERGENCE_CODES, "kind", kind)
    if alpha is None:
        alpha = 0.1 if kind == "skew_kl" else 0.5
    teacher = teacher_logits if teacher_logits.dtype in DTYPES else teacher_logits.float()
    return _ops(logits).row_divergence_(logits, teacher, temperature, code, alpha, scale)


def _ops(logits: Tensor):
    if not native.available():
        raise RuntimeError(f"native_rows: native ops are not available: {native.why_not()}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"native_rows: logits: expected float32 or bfloat16, got {logits.dtype}; use torch_rows")
    return torch.ops.rmsd_kernels


def _head(inputs: RowInputs, ref: RowReference | None) -> dict[str, Tensor | float | None]:
    """Return the arguments that define z, by name."""
    reference = RowReference(None, None, None, None) if ref is None else ref
    return inputs._asdict() | {f"ref_{name}": value for name, value in reference._asdict().items()}


def _stats(values: tuple[Tensor, ...], ref: RowReference | None, out: RowStats | None) -> RowStats:
    return into(out, RowStats(*values[:3], None if ref is None else values[3]))


def _code(codes: dict[str, int], name: str, value: str) -> int:
    if value not in codes:
        raise ValueError(f"native_rows: {name}: expected one of {', '.join(codes)}, got {value!r}")
    return codes[value]
