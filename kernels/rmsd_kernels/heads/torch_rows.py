"""Row back end in eager torch: operations on a chunk of logits.

A row back end is a module with `target_logit`, `score`, `gradient_`, `policy_` and `divergence_`. The other two are
`native_rows` (CPU, compiled) and `triton_rows` (CUDA). This back end supports any floating dtype on any device and is
used if no compiled one is available. In float64, it is the reference in tests of the other two. It processes a few rows
at a time, so its temporaries are small compared with the chunk.

    z = cap(logits + bias) / temperature,  cap(x) = softcap * tanh(x / softcap)   (bias, softcap, temperature: optional)
    log p_v = z_v - lse for v != y, and logp for the target y,  lse = log sum exp z,  logp = min(z_y - lse, 0)

In z, the target's logit is replaced by `target_logit`, a dot product in float32. A 16-bit logit has a relative error of
up to 2^-9, which would otherwise affect the log-prob. A target outside 0..V-1 gives a logp of NaN.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import accumulation_dtype
from .row_formula import divergence_of_rows, divergence_terms, expectation
from .row_types import EXP_LIMIT, PolicyTerms, RowInputs, RowReference, RowStats

_TEMPORARY_BYTES = 16 << 20


def target_logit(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return hidden @ weight[target] of each row in the accumulation dtype, [n]. Targets are clamped to 0..V-1."""
    dtype, index = accumulation_dtype(hidden), targets.clamp(0, len(weight) - 1)
    step = max(1, _TEMPORARY_BYTES // (8 * hidden.shape[1]))
    blocks = [slice(start, start + step) for start in range(0, max(1, len(hidden)), step)]
    return torch.cat([(hidden[b].to(dtype) * weight[index[b]].to(dtype)).sum(dim=-1) for b in blocks])


def score(
    logits: Tensor, inputs: RowInputs, ref: RowReference | None = None, *, out: RowStats | None = None
) -> RowStats:
    """Return RowStats of logits [n, V], in `out` if it is given. Logits are only read."""

    def block(rows: slice) -> tuple[Tensor | None, ...]:
        z = _z(logits[rows], _select_rows(inputs, rows))
        lse = z.logsumexp(dim=-1)
        logp = _pick(z, inputs.targets[rows]) - lse
        stats = RowStats(logp.clamp(max=0.0), lse, lse, None)
        log_p = _log_p(z, inputs.targets[rows], stats)
        full_kl = None if ref is None else expectation(log_p, log_p - _log_r(ref, inputs, rows))
        return stats.logp, -expectation(log_p, log_p), lse, full_kl

    return into(out, RowStats(*_by_blocks(block, logits)))


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

    def block(rows: slice) -> tuple[()]:
        block_inputs = _select_rows(inputs, rows)
        block_stats = RowStats(*(t if t is None else t[rows] for t in stats))
        z = _z(logits[rows], block_inputs)
        factor = 1.0 if block_inputs.temperature is None else 1.0 / block_inputs.temperature.unsqueeze(1)
        if block_inputs.softcap is not None:
            capped = z if block_inputs.temperature is None else z * block_inputs.temperature.unsqueeze(1)
            factor = factor * (1.0 - (capped / block_inputs.softcap).square())
        log_p = _log_p(z, block_inputs.targets, block_stats)
        p = log_p.exp()
        dz = -g_logp[rows].unsqueeze(1) * p
        dz.scatter_add_(1, _valid(block_inputs.targets, z)[1].unsqueeze(1), g_logp[rows].unsqueeze(1))
        impossible = log_p == -math.inf
        if g_entropy is not None:
            inner = p * (log_p + block_stats.entropy.unsqueeze(1)).masked_fill(impossible, 0.0)
            dz -= g_entropy[rows].unsqueeze(1) * inner
        if g_full_kl is not None:
            inner = log_p - _log_r(ref, inputs, rows) - block_stats.full_kl.unsqueeze(1)
            dz += g_full_kl[rows].unsqueeze(1) * (p * inner.masked_fill(impossible, 0.0))
        logits[rows] = dz * factor
        return ()

    _by_blocks(block, logits)


def policy_(
    logits: Tensor,
    inputs: RowInputs,
    terms: PolicyTerms,
    ref: RowReference | None = None,
    *,
    out: RowStats | None = None,
) -> RowStats:
    """Return RowStats of logits [n, V] and overwrite logits with the gradient of the rows' summed policy losses."""
    stats = score(logits, inputs, ref)
    settings = terms.settings
    exact_kl = settings.kl_loss == "full"
    gradient_(
        logits,
        inputs,
        stats,
        g_logp=terms.scale * _policy_slope(stats.logp, terms),
        g_entropy=-terms.scale * settings.entropy_coef if settings.entropy_coef else None,
        ref=ref if exact_kl else None,
        g_full_kl=terms.scale * settings.kl_coef if exact_kl else None,
    )
    return into(out, stats)


def _policy_slope(logp: Tensor, terms: PolicyTerms) -> Tensor:
    """Return the derivative of a row's policy loss with respect to logp, without the row's scale."""
    settings, advantage = terms.settings, terms.advantage
    if terms.rollout_logp is not None:
        advantage = advantage * (logp - terms.rollout_logp).clamp(max=EXP_LIMIT).exp().clamp(max=settings.tis_cap)
    if terms.old_logp is None:
        g = -advantage
    else:
        log_ratio = logp - terms.old_logp
        ratio = log_ratio.clamp(max=EXP_LIMIT).exp()
        clipped = ((ratio > 1 + settings.clip_high) & (advantage > 0)) | (
            (ratio < 1 - settings.clip_low) & (advantage < 0)
        )
        g = torch.where(clipped | (log_ratio > EXP_LIMIT), 0.0, -advantage * ratio)
    if settings.kl_loss in ("none", "full"):
        return g
    d = terms.ref_logp - logp
    slope = {"k1": torch.ones_like, "k2": torch.neg, "k3": _k3_slope}[settings.kl_loss](d)
    if settings.kl_log_ratio_clip is not None:
        slope = torch.where(d.abs() > settings.kl_log_ratio_clip, 0.0, slope)
    return g + settings.kl_coef * slope


def divergence_(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor | None,
    vocab_clip: float | None = None,
) -> Tensor:
    """Return the divergence [n] between teacher and student; kinds and vocab_clip as in linear_divergence.

    With scale [n], overwrite logits with the gradient of the sum of scale * divergence; without it, only read them.
    """
    share = {"jsd": 0.5, "skew_kl": 0.1}.get(kind, 0.0) if alpha is None else alpha

    def block(rows: slice) -> tuple[Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        factor = None if temperature is None else temperature[rows].unsqueeze(1)
        z, teacher_z = logits[rows].to(dtype), teacher_logits[rows].to(dtype)
        if factor is not None:
            z, teacher_z = z / factor, teacher_z / factor
        log_q, log_p = z.log_softmax(dim=-1), teacher_z.log_softmax(dim=-1)
        if vocab_clip is None:
            value, free = divergence_of_rows(log_p, log_q, kind, alpha), None
        else:
            terms = divergence_terms(log_p, log_q, kind, alpha)
            value, free = terms.clamp(max=vocab_clip).sum(dim=-1), ~(terms > vocab_clip)
        if scale is not None:
            dz = _divergence_slope(log_p, log_q, kind, share, free) * scale[rows].unsqueeze(1)
            logits[rows] = dz if factor is None else dz / factor
        return (value,)

    return _by_blocks(block, logits)[0]


def _divergence_slope(log_p: Tensor, log_q: Tensor, kind: str, share: float, free: Tensor | None) -> Tensor:
    """Return the derivative of a divergence with respect to the student's z: q * (f - sum q f), f = d value / dq.

    free: entries whose summand is not clipped; the others have f = 0. None means all.
    """
    q = log_q.exp()
    if kind == "forward_kl":
        p = log_p.exp()
        if free is None:
            return q - p
        p = p * free
        return q * p.sum(dim=-1, keepdim=True) - p
    if kind == "reverse_kl":
        # A constant in f cancels in q * (f - sum q f), but not if f is 0 in some entries.
        slope = log_q - log_p + (0.0 if free is None else 1.0)
    else:
        log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
        # jsd: the derivatives of the two terms through m cancel except for this part.
        slope = (1 - share) * (log_q - log_m) if kind == "jsd" else -(1 - share) * (log_p - log_m).exp()
    slope = slope.masked_fill(log_q == -math.inf, 0.0)
    if free is not None:
        slope = slope.masked_fill(~free, 0.0)
    return q * (slope - (q * slope).sum(dim=-1, keepdim=True))


def into(out: RowStats | None, stats: RowStats) -> RowStats:
    """Copy stats into `out` and return it; return stats if `out` is None."""
    if out is None:
        return stats
    for target, values in zip(out, stats, strict=True):
        if target is not None:
            target.copy_(values)
    return out


def _by_blocks(block: Callable[[slice], tuple[Tensor | None, ...]], logits: Tensor) -> tuple[Tensor | None, ...]:
    """Call block(slice of rows) for blocks of all rows, and concatenate its results."""
    rows, vocabulary = logits.shape
    step = max(1, _TEMPORARY_BYTES // (8 * vocabulary))
    results = [block(slice(start, min(start + step, rows))) for start in range(0, max(rows, 1), step)]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True))


def _select_rows(inputs: RowInputs, rows: slice) -> RowInputs:
    temperature = None if inputs.temperature is None else inputs.temperature[rows]
    return inputs._replace(
        targets=inputs.targets[rows], target_logit=inputs.target_logit[rows], temperature=temperature
    )


def _z(logits: Tensor, inputs: RowInputs) -> Tensor:
    """Return z of the module docstring in a new tensor [n, V]."""
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
    """Overwrite z with log p and return it."""
    z -= stats.lse.unsqueeze(1)
    valid, index = _valid(targets, z)
    exact = torch.where(valid, stats.logp, z.gather(1, index.unsqueeze(1)).squeeze(1))
    return z.scatter_(1, index.unsqueeze(1), exact.unsqueeze(1))


def _log_r(ref: RowReference, inputs: RowInputs, rows: slice) -> Tensor:
    """Return log r of the reference's rows."""
    ref_inputs = _select_rows(inputs, rows)._replace(bias=ref.bias)
    ref_stats = RowStats(ref.logp[rows], ref.lse[rows], ref.lse[rows], None)
    return _log_p(_z(ref.logits[rows], ref_inputs), ref_inputs.targets, ref_stats)


def _k3_slope(d: Tensor) -> Tensor:
    """Return the derivative of exp(d) - d - 1 with respect to logp = ref_logp - d, with exp limited to EXP_LIMIT."""
    return torch.where(d > EXP_LIMIT, 1.0, 1.0 - d.clamp(max=EXP_LIMIT).exp())
