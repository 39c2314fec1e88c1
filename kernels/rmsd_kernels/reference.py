"""Reference forms of the fused losses: eager torch, in the dtype they are given (float64 for the truth of a test).

Every kernel is judged against this file, and it exists once. Logits are a GEMM in the input's dtype; what follows is
computed in float64 for float64 inputs and in float32 otherwise, which is also the dtype of every result. What happens
within one row of logits is in `rows`.

Rows that carry no loss (target = ignore_index, weight 0 in a divergence) are taken out before the GEMM, so what stands
in them, NaN included, reaches neither the loss nor a gradient. A target outside 0..V-1 gives NaN, never a wild read.

`chunk_rows` bounds the memory: rows are scored that many at a time and recomputed in backward (8TDV instead of 6TDV of
work), with at most one chunk's logits alive. None: all at once. Arguments are checked by `rmsd_fast.losses`, not here.

Symbols: T tokens, D hidden, V vocabulary, B sequences, S rollout scores, R teacher scores, P pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import accumulation_dtype, divergence_of_rows, head_logits, in_chunks, score_rows, temperature_rows

# exp(80) = 5.5e34 is finite in float32, and so is its product with an advantage.
EXP_LIMIT = 80.0


class PolicyLoss(NamedTuple):
    """loss: scalar with a gradient. metrics: detached scalars on the loss's device, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class DiscriminatorLoss(NamedTuple):
    """loss: scalar with a gradient. accuracy, margin: detached scalars, weighted by pair_weight, 0 without pairs."""

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


class DiscriminatorOutput(NamedTuple):
    """DiscriminatorLoss and the detached scores it was made of, [S+R] in the order of last_index."""

    loss: Tensor
    accuracy: Tensor
    margin: Tensor
    scores: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi(target) [T], and the entropy of pi [T] on request; ignored rows give 0. See rmsd_fast.losses."""
    keep = torch.nonzero(targets != ignore_index).flatten()
    scores = score_rows(
        hidden, weight, targets, keep, bias, temperature, softcap, return_entropy, chunk_rows=chunk_rows
    )
    zeros = torch.zeros(targets.shape, dtype=scores.logp.dtype, device=hidden.device)
    logp = zeros.index_copy(0, keep, scores.logp)
    return (logp, zeros.index_copy(0, keep, scores.entropy)) if return_entropy else logp


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """sum of token_weights * -log pi(target) over the scored rows / normalizer. See rmsd_fast.losses."""
    keep = torch.nonzero(targets != ignore_index).flatten()
    logp = score_rows(hidden, weight, targets, keep, bias, temperature, softcap, False, chunk_rows=chunk_rows).logp
    return _weighted_sum(-logp, _rows(token_weights, keep, logp.dtype), normalizer)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: str = "k3",
    kl_coef: float = 0.0,
    kl_log_ratio_clip: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_level: str = "token",
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    tis_cap: float | None = None,
    sequence_mask_cap: float | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss with a KL and an entropy term, from hidden states. See rmsd_fast.losses."""
    keep = torch.nonzero(targets != ignore_index).flatten()
    ref = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
    scores = score_rows(
        hidden, weight, targets, keep, bias, temperature, softcap, entropy_coef != 0, ref, kl == "full", chunk_rows
    )
    logp, dtype = scores.logp, scores.logp.dtype
    old = logp.detach() if old_logp is None else _rows(old_logp, keep, dtype)
    sequences = None
    if cu_seqlens is not None:
        sequences = _Sequences(_sequence_of_rows(cu_seqlens, targets)[keep], len(cu_seqlens) - 1)
    log_ratio = logp - old if importance_level == "token" else _sequence_mean(logp - old, sequences)
    objective, metrics = _clipped_objective(log_ratio, _rows(advantages, keep, dtype), clip_low, clip_high)
    metrics |= {"logp": _mean(logp), "entropy": _mean(scores.entropy), "rows": logp.new_tensor(len(keep))}
    if rollout_logp is not None:
        mismatch = _guarded_exp(old - _rows(rollout_logp, keep, dtype))
        correction, importance = _importance_correction(mismatch, sequences, tis_cap, sequence_mask_cap)
        objective = objective * correction
        metrics |= importance

    per_row = -objective
    reference = scores.ref_logp if ref_logp is None else _rows(ref_logp, keep, dtype)
    if reference is not None:
        divergence = scores.full_kl if kl == "full" else kl_estimate(logp, reference, kl, kl_log_ratio_clip)
        metrics |= {"kl": _mean(divergence), "kl_k1": _mean(logp - reference)}
        # A coefficient of 0 adds nothing at all: 0 * inf would be NaN.
        per_row = per_row + kl_coef * divergence if kl_coef else per_row
    per_row = per_row - entropy_coef * scores.entropy if entropy_coef else per_row
    return PolicyLoss(_weighted_sum(per_row, _rows(token_weights, keep, dtype), normalizer), metrics)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, log_ratio_clip: float | None = None) -> Tensor:
    """Per-token estimators of KL(pi || ref) from samples of pi, with d = log ref - log pi: k1 = -d, k2 = d²/2,
    k3 = exp(d) - d - 1. log_ratio_clip clamps d to [-c, c]; exp's argument stays below 80 either way."""
    d = ref_logp - logp
    if log_ratio_clip is not None:
        d = d.clamp(-log_ratio_clip, log_ratio_clip)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        # expm1 keeps the digits that exp(d) - 1 loses near d = 0.
        return torch.expm1(d.clamp(max=EXP_LIMIT)) - d
    raise ValueError(f"kl: expected 'k1', 'k2', 'k3' or 'full', got {kind!r}")


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    kind: str = "forward_kl",
    alpha: float | None = None,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """sum of token_weights * divergence(teacher, student) over rows / normalizer. See rmsd_fast.losses."""
    every = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    keep = torch.nonzero(every if token_weights is None else token_weights != 0).flatten()
    teacher = teacher_hidden if teacher_hidden is not None else teacher_logits
    ids = None
    if teacher_topk is not None:
        teacher, ids = teacher_topk
    teacher_head = None if teacher_weight is None else teacher_weight.detach()

    def block(rows: Tensor, teacher_rows: Tensor, ids_rows: Tensor | None, scale: Tensor | None) -> tuple[Tensor]:
        student_logits = head_logits(rows, weight, None, scale, None)
        if ids_rows is not None:
            # Both sides become distributions over the teacher's k ids alone.
            student_logits = student_logits.gather(1, ids_rows)
        if teacher_head is not None:
            teacher_logits = head_logits(teacher_rows, teacher_head, None, scale, None)
        else:
            teacher_logits = teacher_rows.to(student_logits.dtype)
            teacher_logits = teacher_logits if scale is None else teacher_logits / scale.unsqueeze(1)
        return (divergence_of_rows(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1), kind, alpha),)

    scale = temperature_rows(temperature, keep, hidden)
    ids_rows = None if ids is None else ids[keep]
    (divergence,) = in_chunks(block, (hidden[keep], teacher.detach()[keep], ids_rows, scale), chunk_rows)
    return _weighted_sum(divergence, _rows(token_weights, keep, divergence.dtype), normalizer)


def last_token_values(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Value head on chosen rows, [B]: gather, optional RMSNorm, dot product. See rmsd_fast.losses."""
    dtype = accumulation_dtype(hidden)
    rows = hidden[last_index].to(dtype)
    if norm_weight is not None:
        rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    values = (rows * weight.to(dtype)).sum(dim=-1)
    return values if bias is None else values + bias.to(dtype)


def pairwise_discriminator_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorLoss:
    """sum of pair_weight * quality * softplus(S - T) / normalizer + score_l2 * mean square. See rmsd_fast.losses."""
    dtype = accumulation_dtype(student_scores)
    student, teacher = student_scores.to(dtype), teacher_scores.to(dtype)
    margin = teacher[teacher_index] - student[student_index]
    weights = None if pair_weight is None else pair_weight.detach().to(dtype)
    # softplus(S - T) = -log sigmoid(T - S); torch's softplus switches to the identity at 20, logsigmoid is exact.
    loss = _weighted_sum(-F.logsigmoid(margin) * quality.detach().to(dtype), weights, normalizer)
    if score_l2:
        squares = torch.cat([student, teacher]).square()
        loss = loss + score_l2 * _weighted_sum(squares, None, l2_normalizer)
    margin = margin.detach()
    accuracy = _weighted_sum((margin > 0).to(dtype), weights, None)
    return DiscriminatorLoss(loss, accuracy, _weighted_sum(margin, weights, None))


def discriminator_loss(
    hidden: Tensor,
    last_index: Tensor,
    head: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    num_students: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorOutput:
    """last_token_values of all responses, then pairwise_discriminator_loss. See rmsd_fast.losses."""
    scores = last_token_values(hidden, last_index, head, bias=bias, norm_weight=norm_weight, norm_eps=norm_eps)
    result = pairwise_discriminator_loss(
        scores[:num_students],
        scores[num_students:],
        student_index,
        teacher_index,
        quality,
        pair_weight=pair_weight,
        score_l2=score_l2,
        normalizer=normalizer,
        l2_normalizer=l2_normalizer,
    )
    return DiscriminatorOutput(*result, scores.detach())


class _Sequences(NamedTuple):
    """Sequence number of each scored row, and how many sequences there are."""

    of_row: Tensor
    count: int


def _clipped_objective(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(r*A, clip(r)*A) per row; a row counts as clipped where that minimum has no gradient."""
    ratio = _guarded_exp(log_ratio)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    is_clipped = ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))
    return objective, {"mean_ratio": _mean(ratio), "clip_fraction": _mean(is_clipped.to(ratio.dtype))}


def _importance_correction(
    mismatch: Tensor, sequences: _Sequences | None, tis_cap: float | None, mask_cap: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the policy term against trainer/engine mismatch, and what is to be logged about it."""
    correction = torch.ones_like(mismatch)
    metrics = {"importance_ratio": _mean(mismatch)}
    if tis_cap is not None:
        correction = mismatch.clamp(max=tis_cap)
        metrics["tis_capped_fraction"] = _mean((mismatch > tis_cap).to(mismatch.dtype))
    if mask_cap is not None:
        left_out = _sequence_mean(mismatch, sequences) > mask_cap
        correction = correction.masked_fill(left_out, 0.0)
        metrics["sequence_masked_fraction"] = _mean(left_out.to(mismatch.dtype))
    return correction.detach(), metrics


def _sequence_of_rows(cu_seqlens: Tensor, targets: Tensor) -> Tensor:
    rows = torch.arange(len(targets), device=targets.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def _sequence_mean(values: Tensor, sequences: _Sequences) -> Tensor:
    """Each row's mean over the scored rows of its own sequence."""
    zeros = torch.zeros(sequences.count, dtype=values.dtype, device=values.device)
    counts = zeros.index_add(0, sequences.of_row, torch.ones_like(values))
    return (zeros.index_add(0, sequences.of_row, values) / counts.clamp(min=1))[sequences.of_row]


def _weighted_sum(values: Tensor, weights: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """sum(weights * values) / normalizer, where a normalizer of 0 (nothing scored anywhere) counts as 1."""
    if normalizer is None:
        normalizer = float(len(values)) if weights is None else weights.sum()
    normalizer = torch.as_tensor(normalizer, dtype=values.dtype, device=values.device).detach()
    total = values.sum() if weights is None else (values * weights).sum()
    return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)


def _rows(values: Tensor | None, keep: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach()[keep].to(dtype)


def _guarded_exp(values: Tensor) -> Tensor:
    return values.clamp(max=EXP_LIMIT).exp()


def _mean(values: Tensor) -> Tensor:
    return values.detach().sum() / max(len(values), 1)
