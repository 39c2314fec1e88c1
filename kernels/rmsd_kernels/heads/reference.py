"""Reference implementations of the head losses in eager torch, in the dtype of the inputs. Tests use float64 as truth.

All kernels are tested against this file. Logits are computed by a GEMM in the dtype of hidden. All later computations
and results are float64 for float64 inputs and float32 otherwise. The computation within one row of logits is in
`row_formula`.

Rows without a loss (target = ignore_index, or weight 0 in a divergence) are removed before the GEMM, so their content,
even NaN, affects neither the loss nor the gradients. A target outside 0..V-1 gives NaN and is never dereferenced.

The computation on the per-row numbers of the policy loss (ratio, clip, correction, masks, normalizer, metrics) is in
`policy_formula`. The fused head uses the same code, which is also tested with values computed by hand. All rows are
processed at once, with the memory use of eager code. The public functions check the arguments.

Symbols: T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from .policy_formula import PolicyLoss, policy_loss, row_weights, scored_of
from .row_formula import divergence_of_rows, head_logits, score_rows, temperature_rows
from .row_types import PolicySettings
from .topk import TopK


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log pi(target) [T], and optionally the entropy of pi [T]; ignored rows give 0. See the public function."""
    keep = _scored_rows(targets, ignore_index)
    scores = score_rows(hidden, weight, targets, keep, bias, temperature, softcap, return_entropy)
    zeros = torch.zeros(targets.shape, dtype=scores.logp.dtype, device=hidden.device)
    logp = zeros.index_copy(0, keep, scores.logp)
    return (logp, zeros.index_copy(0, keep, scores.entropy)) if return_entropy else logp


def linear_rank(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Return the number of logits above that of each target, int64 [T]. See the public function."""
    logits = head_logits(hidden, weight, bias, None, None)
    target = logits.gather(1, targets[:, None])
    return ((logits > target) | logits.isnan() | target.isnan()).sum(dim=1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the sum of token_weights * -log pi(target) over scored rows / normalizer. See the public function."""
    if token_weights is not None and ignore_index is not None:
        targets = torch.where(token_weights == 0, ignore_index, targets)
    keep = _scored_rows(targets, ignore_index)
    logp = score_rows(hidden, weight, targets, keep, bias, temperature, softcap, False).logp
    return weighted_sum(-logp, _rows(token_weights, keep, logp.dtype), normalizer)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
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
) -> PolicyLoss:
    """Compute the clipped policy-gradient loss with a KL and an entropy term. See the public function."""
    settings = PolicySettings.of(
        kl=kl,
        kl_coef=kl_coef,
        kl_log_ratio_clip=kl_log_ratio_clip,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_level=importance_level,
        tis_cap=tis_cap,
        sequence_mask_cap=sequence_mask_cap,
        entropy_coef=entropy_coef,
    )
    keep = _scored_rows(targets, ignore_index)
    ref = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
    scores = score_rows(hidden, weight, targets, keep, bias, temperature, softcap, entropy_coef != 0, ref, kl == "full")
    zeros = torch.zeros(targets.shape, dtype=scores.logp.dtype, device=hidden.device)
    logp, entropy, head_ref_logp, full_kl = (None if t is None else zeros.index_copy(0, keep, t) for t in scores)
    scored = scored_of(targets, ignore_index, cu_seqlens, zeros.dtype)
    weights = row_weights(scored, token_weights, normalizer, zeros.dtype)
    return policy_loss(
        logp=logp,
        entropy=entropy,
        ref_logp=head_ref_logp if ref_logp is None else ref_logp,
        full_kl=full_kl,
        advantages=advantages,
        old_logp=old_logp,
        rollout_logp=rollout_logp,
        weights=weights,
        scored=scored,
        settings=settings,
    )


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
    vocab_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the sum of token_weights * divergence over rows / normalizer. See the public function."""
    all_rows = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    keep = torch.nonzero(all_rows if token_weights is None else token_weights != 0).flatten()
    teacher = teacher_hidden if teacher_hidden is not None else teacher_logits
    ids = None
    if teacher_topk is not None:
        teacher, ids = teacher_topk
    teacher_head = None if teacher_weight is None else teacher_weight.detach()

    scale = temperature_rows(temperature, keep, hidden)
    student_z, teacher_rows = head_logits(hidden[keep], weight, None, scale, None), teacher.detach()[keep]
    if ids is not None:
        # Both sides are renormalized over the teacher's k ids.
        student_z = student_z.gather(1, ids[keep])
    if teacher_head is not None:
        teacher_z = head_logits(teacher_rows, teacher_head, None, scale, None)
    else:
        teacher_z = teacher_rows.to(student_z.dtype)
        teacher_z = teacher_z if scale is None else teacher_z / scale.unsqueeze(1)
    divergence = divergence_of_rows(teacher_z.log_softmax(-1), student_z.log_softmax(-1), kind, alpha, vocab_clip)
    return weighted_sum(divergence, _rows(token_weights, keep, divergence.dtype), normalizer)


@torch.no_grad()
def linear_topk(
    hidden: Tensor, weight: Tensor, k: int, *, ids: Tensor | None = None, temperature: float | Tensor = 1.0
) -> TopK:
    """Return the k most probable tokens with their log-probs, and log-probs of ids. See the public function."""
    keep = torch.arange(len(hidden), device=hidden.device)
    scale = temperature_rows(temperature, keep, hidden)
    logp = head_logits(hidden, weight, None, scale, None).log_softmax(dim=-1)
    best = logp.topk(k, dim=-1)
    return TopK(best.values, best.indices, None if ids is None else logp.gather(1, ids))


def _scored_rows(targets: Tensor, ignore_index: int | None) -> Tensor:
    all_rows = torch.ones_like(targets, dtype=torch.bool)
    return torch.nonzero(all_rows if ignore_index is None else targets != ignore_index).flatten()


def weighted_sum(values: Tensor, weights: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """Return sum(weights * values) / normalizer. A normalizer of 0 (no row is scored) is treated as 1."""
    if normalizer is None:
        normalizer = float(len(values)) if weights is None else weights.sum()
    normalizer = torch.as_tensor(normalizer, dtype=values.dtype, device=values.device).detach().reshape(())
    total = values.sum() if weights is None else (values * weights).sum()
    return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)


def _rows(values: Tensor | None, keep: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach()[keep].to(dtype)
