"""What is done to a chunk of logits: the records that all row back ends share, and the one in eager torch.

A row back end is a module with `score`, `gradient_`, `policy_` and `divergence_`; the others are `native_rows` (CPU,
compiled) and `triton_rows` (CUDA). This one takes any floating dtype on any device and serves where nothing is
compiled; in float64 it is what the others are tested against. It works through a few rows at a time, so that its
temporaries stay small beside the chunk.

    z = cap(logits + bias) / temperature,  cap(x) = softcap * tanh(x / softcap)       (each part only where given)
    log p_v = z_v - lse for v != y, and logp for the target y,  lse = log sum exp z,  logp = min(z_y - lse, 0)

In z the logit of the target is `target_logit`, computed by the caller as a dot product in float32: a 16-bit logit is
off by up to 2^-9 of its size, and that would be the error of the log-prob. A target outside 0..V-1 gives a logp of NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .row_formula import divergence_of_rows, expectation

# exp(80) = 5.5e34 is finite in float32, and so is its product with an advantage.
EXP_LIMIT = 80.0
_TEMPORARY_BYTES = 16 << 20


class RowInputs(NamedTuple):
    """How z is made. All but targets in the accumulation dtype (float32; float64 for float64 logits)."""

    targets: Tensor  # int64 [n]
    target_logit: Tensor  # [n]
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # [n]; None = 1
    softcap: float | None


class RowStats(NamedTuple):
    """Of each row [n]: log-prob of the target, entropy, log-sum-exp, and with a reference sum p (log p - log r)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    full_kl: Tensor | None


class RowReference(NamedTuple):
    """Logits of the reference head for the exact KL, never written, and what `score` found in them."""

    logits: Tensor  # [n, V]
    bias: Tensor | None  # [V]
    lse: Tensor  # [n]
    logp: Tensor  # [n]


class PolicyTerms(NamedTuple):
    """The policy loss of one row, scale * (-min(r*A, clip(r)*A) + kl_coef*KL - entropy_coef*H), r = exp(logp - old)."""

    scale: Tensor  # [n], weight of the row / normalizer
    advantage: Tensor  # [n], A times the importance correction
    old_logp: Tensor | None  # [n]; None = on-policy: r is 1 and keeps its gradient
    ref_logp: Tensor | None  # [n], for k1, k2, k3
    kl: str  # "none", "k1", "k2", "k3", "full"
    kl_coef: float
    kl_log_ratio_clip: float | None
    clip_low: float
    clip_high: float
    entropy_coef: float


def score(logits: Tensor, inputs: RowInputs, ref: RowReference | None = None) -> RowStats:
    """RowStats of logits [n, V], which are only read."""

    def block(rows: slice) -> tuple[Tensor | None, ...]:
        z = _z(logits[rows], _rows_of(inputs, rows))
        lse = z.logsumexp(dim=-1)
        logp = _pick(z, inputs.targets[rows]) - lse
        stats = RowStats(logp.clamp(max=0.0), lse, lse, None)
        log_p = _log_p(z, inputs.targets[rows], stats)
        full_kl = None if ref is None else expectation(log_p, log_p - _log_r(ref, inputs, rows))
        return stats.logp, -expectation(log_p, log_p), lse, full_kl

    return RowStats(*_by_blocks(block, logits))


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

    def block(rows: slice) -> tuple[()]:
        part, given = _rows_of(inputs, rows), RowStats(*(t if t is None else t[rows] for t in stats))
        z = _z(logits[rows], part)
        factor = 1.0 if part.temperature is None else 1.0 / part.temperature.unsqueeze(1)
        if part.softcap is not None:
            tempered = z if part.temperature is None else z * part.temperature.unsqueeze(1)
            factor = factor * (1.0 - (tempered / part.softcap).square())
        log_p = _log_p(z, part.targets, given)
        p = log_p.exp()
        dz = -g_logp[rows].unsqueeze(1) * p
        dz.scatter_add_(1, _valid(part.targets, z)[1].unsqueeze(1), g_logp[rows].unsqueeze(1))
        impossible = log_p == -math.inf
        if g_entropy is not None:
            inner = p * (log_p + given.entropy.unsqueeze(1)).masked_fill(impossible, 0.0)
            dz -= g_entropy[rows].unsqueeze(1) * inner
        if g_full_kl is not None:
            inner = log_p - _log_r(ref, inputs, rows) - given.full_kl.unsqueeze(1)
            dz += g_full_kl[rows].unsqueeze(1) * (p * inner.masked_fill(impossible, 0.0))
        logits[rows] = dz * factor
        return ()

    _by_blocks(block, logits)


def policy_(logits: Tensor, inputs: RowInputs, terms: PolicyTerms, ref: RowReference | None = None) -> RowStats:
    """RowStats of logits [n, V], which become the gradient of the sum of the rows' policy losses."""
    stats = score(logits, inputs, ref)
    gradient_(logits, inputs, stats, *policy_coefficients(stats.logp, terms, ref))
    return stats


def policy_coefficients(
    logp: Tensor, terms: PolicyTerms, ref: RowReference | None
) -> tuple[Tensor, Tensor | None, RowReference | None, Tensor | None]:
    """The arguments of gradient_ after stats: derivatives of PolicyTerms' loss by logp, entropy and full KL."""
    if terms.old_logp is None:
        g = -terms.advantage
    else:
        log_ratio = logp - terms.old_logp
        ratio = log_ratio.clamp(max=EXP_LIMIT).exp()
        clipped = ((ratio > 1 + terms.clip_high) & (terms.advantage > 0)) | (
            (ratio < 1 - terms.clip_low) & (terms.advantage < 0)
        )
        g = torch.where(clipped | (log_ratio > EXP_LIMIT), 0.0, -terms.advantage * ratio)
    if terms.kl in ("k1", "k2", "k3"):
        d = terms.ref_logp - logp
        slope = {"k1": torch.ones_like, "k2": torch.neg, "k3": _k3_slope}[terms.kl](d)
        if terms.kl_log_ratio_clip is not None:
            slope = torch.where(d.abs() > terms.kl_log_ratio_clip, 0.0, slope)
        g = g + terms.kl_coef * slope
    g_entropy = -terms.scale * terms.entropy_coef if terms.entropy_coef else None
    if terms.kl == "full":
        return terms.scale * g, g_entropy, ref, terms.scale * terms.kl_coef
    return terms.scale * g, g_entropy, None, None


def divergence_(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor | None,
) -> Tensor:
    """Divergence [n] of teacher from student; kinds as in linear_divergence.

    Where scale [n] is given, logits become scale times its gradient with respect to them; else they are only read.
    """
    share = {"jsd": 0.5, "skew_kl": 0.1}.get(kind, 0.0) if alpha is None else alpha

    def block(rows: slice) -> tuple[Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        factor = None if temperature is None else temperature[rows].unsqueeze(1)
        z, teacher_z = logits[rows].to(dtype), teacher_logits[rows].to(dtype)
        if factor is not None:
            z, teacher_z = z / factor, teacher_z / factor
        log_q, log_p = z.log_softmax(dim=-1), teacher_z.log_softmax(dim=-1)
        value = divergence_of_rows(log_p, log_q, kind, alpha)
        if scale is not None:
            dz = _divergence_slope(log_p, log_q, kind, share) * scale[rows].unsqueeze(1)
            logits[rows] = dz if factor is None else dz / factor
        return (value,)

    return _by_blocks(block, logits)[0]


def _divergence_slope(log_p: Tensor, log_q: Tensor, kind: str, share: float) -> Tensor:
    """Derivative of a divergence by the student's z: q * (f - sum q f), f its derivative by q."""
    q = log_q.exp()
    if kind == "forward_kl":
        return q - log_p.exp()
    if kind == "reverse_kl":
        slope = log_q - log_p
    else:
        log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
        # jsd: what its two parts add to each other's derivative cancels but for this.
        slope = (1 - share) * (log_q - log_m) if kind == "jsd" else -(1 - share) * (log_p - log_m).exp()
    slope = slope.masked_fill(log_q == -math.inf, 0.0)
    return q * (slope - (q * slope).sum(dim=-1, keepdim=True))


def _by_blocks(block: Callable[[slice], tuple[Tensor | None, ...]], logits: Tensor) -> tuple[Tensor | None, ...]:
    """block(slice of rows) over all rows, its results joined."""
    rows, vocabulary = logits.shape
    step = max(1, _TEMPORARY_BYTES // (8 * vocabulary))
    parts = [block(slice(start, min(start + step, rows))) for start in range(0, max(rows, 1), step)]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def _rows_of(inputs: RowInputs, rows: slice) -> RowInputs:
    temperature = None if inputs.temperature is None else inputs.temperature[rows]
    return inputs._replace(
        targets=inputs.targets[rows], target_logit=inputs.target_logit[rows], temperature=temperature
    )


def _z(logits: Tensor, inputs: RowInputs) -> Tensor:
    """z of the module docstring, a fresh [n, V]."""
    z = logits.to(inputs.target_logit.dtype, copy=True)
    valid, index = _valid(inputs.targets, z)
    exact = torch.where(valid, inputs.target_logit, z.gather(1, index.unsqueeze(1)).squeeze(1))
    z.scatter_(1, index.unsqueeze(1), exact.unsqueeze(1))
    if inputs.bias is not None:
        z += inputs.bias
    if inputs.softcap is not None:
        z.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return z if inputs.temperature is None else z.div_(inputs.temperature.unsqueeze(1))


def _valid(targets: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    vocabulary = z.shape[1]
    return (targets >= 0) & (targets < vocabulary), targets.clamp(0, vocabulary - 1)


def _pick(z: Tensor, targets: Tensor) -> Tensor:
    valid, index = _valid(targets, z)
    return torch.where(valid, z.gather(1, index.unsqueeze(1)).squeeze(1), math.nan)


def _log_p(z: Tensor, targets: Tensor, stats: RowStats) -> Tensor:
    """z becomes log p in place."""
    z -= stats.lse.unsqueeze(1)
    valid, index = _valid(targets, z)
    exact = torch.where(valid, stats.logp, z.gather(1, index.unsqueeze(1)).squeeze(1))
    return z.scatter_(1, index.unsqueeze(1), exact.unsqueeze(1))


def _log_r(ref: RowReference, inputs: RowInputs, rows: slice) -> Tensor:
    """log r of the reference's rows."""
    part = _rows_of(inputs, rows)._replace(bias=ref.bias)
    given = RowStats(ref.logp[rows], ref.lse[rows], ref.lse[rows], None)
    return _log_p(_z(ref.logits[rows], part), part.targets, given)


def _k3_slope(d: Tensor) -> Tensor:
    """Derivative of exp(d) - d - 1 by logp = ref_logp - d, exp's argument guarded at EXP_LIMIT."""
    return torch.where(d > EXP_LIMIT, 1.0, 1.0 - d.clamp(max=EXP_LIMIT).exp())
