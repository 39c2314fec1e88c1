"""Row back end on CPU: the compiled ops of csrc/ behind the functions of `torch_rows`, float32 and bfloat16 logits.

Each function is two passes over a row that stays in the cache between them: logits are read once from memory and
written at most once (n*V*itemsize bytes each). Sums are float32 within 512 columns and double beyond; a row is one
thread's, so results do not depend on the number of threads. Rows may be any distance apart, columns are adjacent;
vectors are contiguous float32, targets int64. Nothing is differentiable here.

Raises (all functions):
    RuntimeError: the library is not there (see native.why_not), or a shape, stride or dtype of a vector differs.
    TypeError: logits are neither float32 nor bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .row_types import PolicyTerms, RowInputs, RowReference, RowStats
from .torch_rows import into, target_logit

__all__ = ["divergence_", "gradient_", "policy_", "score", "target_logit"]

# The ops take these as numbers.
KL_CODES = {"none": 0, "k1": 1, "k2": 2, "k3": 3, "full": 4}
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3}
DTYPES = (torch.float32, torch.bfloat16)


def score(
    logits: Tensor, inputs: RowInputs, ref: RowReference | None = None, *, out: RowStats | None = None
) -> RowStats:
    """RowStats of logits [n, V], which are only read; written to `out` where that is given."""
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
    """logits [n, V] become the gradient of g_logp*logp + g_entropy*entropy + g_full_kl*full_kl with respect to them."""
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
    """RowStats of logits [n, V], which become the gradient of the sum of the rows' policy losses."""
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
    """Divergence [n] of teacher from student; kinds as in linear_divergence. Teacher logits of another dtype than
    float32 and bfloat16 are copied to float32.

    Where scale [n] is given, logits become scale times its gradient with respect to them; else they are only read.
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
    """The arguments that say how z is made, by name."""
    reference = RowReference(None, None, None, None) if ref is None else ref
    return inputs._asdict() | {f"ref_{name}": value for name, value in reference._asdict().items()}


def _stats(values: tuple[Tensor, ...], ref: RowReference | None, out: RowStats | None) -> RowStats:
    return into(out, RowStats(*values[:3], None if ref is None else values[3]))


def _code(codes: dict[str, int], name: str, value: str) -> int:
    if value not in codes:
        raise ValueError(f"native_rows: {name}: expected one of {', '.join(codes)}, got {value!r}")
    return codes[value]
