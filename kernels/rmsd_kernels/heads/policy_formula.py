"""Compute the policy loss from per-row values [T]: log-probs, entropy, exact KL. Reference and fused head use it.

Rows that are not scored have no effect, even if they contain NaN. See `linear_policy_loss` for the formula.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .row_types import EXP_LIMIT, PolicySettings


class PolicyLoss(NamedTuple):
    """loss is a scalar with a gradient; metrics are detached scalars on the device of the loss, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Scored(NamedTuple):
    """The scored rows: mask [T] (None: all), their number, the sequence of each row [T], lengths of sequences [B]."""

    mask: Tensor | None
    count: Tensor
    sequence: Tensor | None
    lengths: Tensor | None

    def clean(self, values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return values [T] detached, with 0 in rows that are not scored."""
        if values is None:
            return None
        values = values.detach().to(dtype)
        return values.contiguous() if self.mask is None else torch.where(self.mask, values, 0.0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the detached mean over scored rows, or 0 if there are none."""
        values = values.detach()
        total = (values if self.mask is None else torch.where(self.mask, values, 0.0)).sum()
        return total / self.count.clamp(min=1)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Return for each row the mean over the scored rows of its sequence. values must be 0 in all other rows."""
        ones = torch.ones_like(values) if self.mask is None else self.mask.to(values.dtype)
        # index_add does not have a fixed order on CUDA. "unsafe" skips checks that wait for the device.
        sums, counts = (
            torch.segment_reduce(t.contiguous(), "sum", lengths=self.lengths, unsafe=True) for t in (values, ones)
        )
        return (sums / counts.clamp(min=1))[self.sequence]


def scored_of(targets: Tensor, ignore_index: int | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Scored:
    """Return the scored rows. Does not wait for the device."""
    mask = None if ignore_index is None else targets != ignore_index
    count = torch.full((), len(targets), dtype=dtype, device=targets.device) if mask is None else mask.sum().to(dtype)
    if cu_seqlens is None:
        return Scored(mask, count, None, None)
    rows = torch.arange(len(targets), device=targets.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    # Edges that end before T raise if they are on the CPU. On other devices, the remaining rows join the last sequence.
    sequence = sequence.clamp(max=len(cu_seqlens) - 2)
    return Scored(mask, count, sequence, cu_seqlens.diff().long())


def row_weights(
    scored: Scored, token_weights: Tensor | None, normalizer: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return token_weights / normalizer [T], 0 in rows that are not scored. A normalizer of 0 is treated as 1."""
    length = len(scored.mask) if scored.mask is not None else None
    weights = scored.clean(token_weights, dtype)
    if normalizer is None:
        normalizer = scored.count if weights is None else weights.sum()
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(dtype=dtype, device=scored.count.device).reshape(())
    else:
        normalizer = torch.full((), normalizer, dtype=dtype, device=scored.count.device)
    if weights is None and length is not None:
        weights = scored.mask.to(dtype)
    divisor = torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return 1.0 / divisor if weights is None else weights / divisor


def importance_correction(
    mismatch: Tensor, scored: Scored, settings: PolicySettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weights of the policy term that correct the mismatch between trainer and engine, and the metrics.

    mismatch: exp(old - rollout), [T].
    """
    correction = torch.ones_like(mismatch)
    metrics = {"importance_ratio": scored.mean(mismatch)}
    if settings.tis_cap is not None:
        correction = mismatch.clamp(max=settings.tis_cap)
        metrics["tis_capped_fraction"] = scored.mean((mismatch > settings.tis_cap).to(mismatch.dtype))
    if settings.sequence_mask_cap is not None:
        scored_mismatch = mismatch if scored.mask is None else torch.where(scored.mask, mismatch, 0.0)
        masked = scored.sequence_mean(scored_mismatch) > settings.sequence_mask_cap
        correction = correction.masked_fill(masked, 0.0)
        metrics["sequence_masked_fraction"] = scored.mean(masked.to(mismatch.dtype))
    return correction.detach(), metrics


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, log_ratio_clip: float | None = None) -> Tensor:
    """Return a per-token estimate of KL(pi || ref) from samples of pi.

    With d = log ref - log pi: k1 = -d, k2 = d²/2, k3 = exp(d) - d - 1. log_ratio_clip = c clamps d to [-c, c]. The
    argument of exp is limited to EXP_LIMIT = 80 in any case.
    """
    d = ref_logp - logp
    if log_ratio_clip is not None:
        d = d.clamp(-log_ratio_clip, log_ratio_clip)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        # Near d = 0, exp(d) - 1 would lose precision; expm1 does not.
        return torch.expm1(d.clamp(max=EXP_LIMIT)) - d
    raise ValueError(f"kl: expected 'k1', 'k2', 'k3' or 'full', got {kind!r}")


def clipped_objective(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A), and a mask of the rows where its gradient is 0."""
    low, high = 1 - clip_low, 1 + clip_high
    objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    return objective, ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))


def guarded_exp(values: Tensor) -> Tensor:
    """Return exp(min(values, EXP_LIMIT))."""
    return values.clamp(max=EXP_LIMIT).exp()


def policy_loss(
    *,
    logp: Tensor,
    entropy: Tensor,
    ref_logp: Tensor | None,
    full_kl: Tensor | None,
    advantages: Tensor,
    old_logp: Tensor | None,
    rollout_logp: Tensor | None,
    weights: Tensor,
    scored: Scored,
    settings: PolicySettings,
) -> PolicyLoss:
    """Return the sum of weights * (policy term + kl_coef * KL - entropy_coef * H) over scored rows, and metrics.

    logp, entropy, ref_logp and full_kl must be 0 in rows that are not scored; weights come from row_weights.
    """
    dtype = logp.dtype
    old = logp.detach() if old_logp is None else scored.clean(old_logp, dtype)
    log_ratio = logp - old
    if settings.importance_level == "sequence":
        log_ratio = scored.sequence_mean(log_ratio)
    ratio, advantage = guarded_exp(log_ratio), scored.clean(advantages, dtype)
    objective, is_clipped = clipped_objective(ratio, advantage, settings.clip_low, settings.clip_high)
    metrics = {
        "mean_ratio": scored.mean(ratio),
        "clip_fraction": scored.mean(is_clipped.to(dtype)),
        "logp": scored.mean(logp),
        "entropy": scored.mean(entropy),
        "rows": scored.count,
    }
    if rollout_logp is not None:
        mismatch = guarded_exp(old - scored.clean(rollout_logp, dtype))
        correction, importance = importance_correction(mismatch, scored, settings)
        objective = objective * correction
        metrics |= importance
    per_row = -objective
    if ref_logp is not None:
        reference = scored.clean(ref_logp, dtype)
        kind, clip = settings.kl, settings.kl_log_ratio_clip
        kl = full_kl if kind == "full" else kl_estimate(logp, reference, kind, clip)
        metrics |= {"kl": scored.mean(kl), "kl_k1": scored.mean(logp - reference)}
        per_row = per_row if settings.kl_loss == "none" else per_row + settings.kl_coef * kl
    per_row = per_row - settings.entropy_coef * entropy if settings.entropy_coef else per_row
    return PolicyLoss((per_row * weights).sum(), metrics)
