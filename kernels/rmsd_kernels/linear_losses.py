"""Public losses on the hidden states of a language-model head: arguments checked, implementation chosen.

The formulas are in `reference`; `rmsd_fast.losses` re-exports these functions and says what `impl` means.
"""

import torch
from torch import Tensor

from . import checks, native, reference
from .reference import PolicyLoss

DEFAULT_MEMORY_BUDGET_BYTES = 1 << 30
# Copies of a row of logits alive at once, forward and backward together, in the dtype of the softmax (peaks counted by
# torch's profiler: 4.3 for a cross entropy, 6.3 with an entropy term, 8.5 with an exact KL too, 12.5 for a JSD).
_LIVE_COPIES = 7
_LIVE_COPIES_TWO_HEADS = 13


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
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, and on request the entropy, of log_softmax(softcapped logits / temperature).

    Args:
        hidden: [T, D], float. weight: [V, D], same dtype. bias: [V]. targets: [T], int64.
        temperature: one for all rows or one per row, [T]; above 0.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature.
        ignore_index: rows with this target give 0 and no gradient, whatever their hidden state holds.
    Returns:
        logp [T], or (logp [T], entropy [T]); both differentiable, logp never above 0.
    Raises:
        ValueError: shapes, devices or values do not fit; targets out of range (CPU; elsewhere they give NaN).
        TypeError: dtypes do not fit. RuntimeError: impl is not available.
    """
    _check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    unfit = native.why_not_logprob(hidden, weight, bias, temperature, softcap)
    if impl == "native" and unfit:
        raise RuntimeError(f"impl: 'native' cannot serve this call: {unfit}; use 'auto' or 'torch'")
    if impl == "native" or (impl == "auto" and not unfit):
        budget = DEFAULT_MEMORY_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes
        logp, entropy = native.linear_logprob(hidden, weight, targets, temperature, ignore_index, budget)
        return (logp, entropy) if return_entropy else logp
    return reference.linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        chunk_rows=_chunk_rows(impl, memory_budget_bytes, hidden, weight),
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Sum over scored rows of -token_weights * logp, divided by normalizer: a scalar.

    Args beyond linear_logprob:
        token_weights: [T]. normalizer: None = number of scored rows, or the sum of their token_weights where given.
    """
    _check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    _check_weights(token_weights, normalizer, hidden)
    return reference.linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        token_weights=token_weights,
        normalizer=normalizer,
        chunk_rows=_chunk_rows(impl, memory_budget_bytes, hidden, weight),
    )


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss with KL and entropy terms, straight from hidden states.

    loss = sum over scored rows of token_weights * (-w * min(r*A, clip(r, 1-clip_low, 1+clip_high)*A)
           + kl_coef * KL - entropy_coef * H) / normalizer

    Args beyond linear_cross_entropy (per-row tensors are float [T]; what stands in ignored rows has no effect):
        advantages: A. old_logp: log-probs of the sampling policy in this trainer, r = exp(logp - old_logp); None =
            on-policy: r is 1 and its gradient stays.
        ref_logp, or ref_hidden [T, D'] + ref_weight [V, D'] (+ ref_bias [V]): the reference policy.
        kl: with d = ref_logp - logp, "k1" = -d, "k2" = d²/2, "k3" = exp(d) - d - 1, "full" = sum_v pi (log pi -
            log ref) (needs ref_hidden). Differentiated as they stand, without a ratio weight: on-policy k2's gradient
            is that of KL(pi||ref), k1's is zero in expectation. With kl_coef = 0 a given reference is only measured.
        kl_log_ratio_clip: clamps d to [-c, c] (k1, k2, k3). None is exact; exp's argument is guarded at 80 either way.
        importance_level: "sequence" takes as r the exponential of the mean log-ratio over the scored rows of the row's
            sequence. cu_seqlens: edges of the packed sequences, int [B+1]; needed for it and for sequence_mask_cap.
        rollout_logp: log-probs as the rollout engine gave them. w = min(exp(old_logp - rollout_logp), tis_cap), and 0
            for sequences whose mean of exp(old_logp - rollout_logp) is above sequence_mask_cap; detached. w acts on the
            policy term alone; the rows stay in the normalizer.
    Returns:
        PolicyLoss(loss, metrics). Metrics are means over scored rows (0 without any): logp, entropy, mean_ratio,
        clip_fraction; with a reference kl and kl_k1; with rollout_logp importance_ratio, tis_capped_fraction,
        sequence_masked_fraction; and rows, their number, to combine them over batches.
    Source: R-MSD (arXiv 2603.11423) L_RL; its open points as in GAD (arXiv 2511.10643).
    """
    _check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    _check_weights(token_weights, normalizer, hidden)
    per_row = {"advantages": advantages, "old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    for name, values in per_row.items():
        if values is not None or name == "advantages":
            checks.check_vector(name, values, len(hidden), hidden)
    checks.check_choice("kl", kl, ("k1", "k2", "k3", "full"))
    _check_reference(hidden, weight, bias, ref_logp, ref_hidden, ref_weight, ref_bias, kl, kl_coef, kl_log_ratio_clip)
    _check_ratio(hidden, clip_low, clip_high, importance_level, cu_seqlens, rollout_logp, tis_cap, sequence_mask_cap)
    checks.check_number("entropy_coef", entropy_coef)
    return reference.linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        kl=kl,
        kl_coef=kl_coef,
        kl_log_ratio_clip=kl_log_ratio_clip,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_level=importance_level,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        rollout_logp=rollout_logp,
        tis_cap=tis_cap,
        sequence_mask_cap=sequence_mask_cap,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
        chunk_rows=_chunk_rows(impl, memory_budget_bytes, hidden, weight, two_heads=ref_hidden is not None),
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
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Sum over rows of token_weights * divergence between teacher p and student q, divided by normalizer: a scalar.

    Args:
        hidden [T, D], weight [V, D]: the student; gradients go here only.
        One teacher of: teacher_hidden [T, D'] + teacher_weight [V, D']; teacher_logits [T, V]; teacher_topk = (logits
            or log-probs [T, k], int64 ids [T, k]), where both sides become distributions over those k ids.
        kind: "forward_kl" KL(p||q); "reverse_kl" KL(q||p); "jsd" alpha KL(p||m) + (1-alpha) KL(q||m) with
            m = alpha p + (1-alpha) q; "skew_kl" KL(p||m).
        alpha: in (0, 1), for jsd (None: 0.5) and skew_kl (None: 0.1) alone.
        temperature: divides the logits of both sides; the loss is not scaled by its square.
        token_weights: [T]; rows of weight 0 take no part. normalizer: None = T, or the sum of given token_weights.
    Raises: as linear_logprob; ValueError also for no teacher or several.
    """
    checks.check_head(hidden, weight)
    checks.check_temperature(temperature, hidden)
    _check_weights(token_weights, normalizer, hidden)
    checks.check_choice("kind", kind, ("forward_kl", "reverse_kl", "jsd", "skew_kl"))
    if alpha is not None:
        if kind not in ("jsd", "skew_kl"):
            raise ValueError(f"alpha: has no effect with kind={kind!r}; leave it out")
        checks.check_number("alpha", alpha, above=0.0)
        if alpha >= 1:
            raise ValueError(f"alpha: expected a number in (0, 1), got {alpha!r}")
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_logits, teacher_topk)
    return reference.linear_divergence(
        hidden,
        weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_logits=teacher_logits,
        teacher_topk=teacher_topk,
        kind=kind,
        alpha=alpha,
        temperature=temperature,
        token_weights=token_weights,
        normalizer=normalizer,
        chunk_rows=_chunk_rows(impl, memory_budget_bytes, hidden, weight, two_heads=True),
    )


def _chunk_rows(
    impl: str, memory_budget_bytes: int | None, hidden: Tensor, weight: Tensor, *, two_heads: bool = False
) -> int | None:
    """Rows scored at a time; None: all."""
    if memory_budget_bytes is not None:
        checks.check_number("memory_budget_bytes", memory_budget_bytes, above=0.0)
    if checks.resolve_impl(impl) == "reference":
        if memory_budget_bytes is not None:
            raise ValueError("memory_budget_bytes: has no effect with impl='reference'; leave it out or use 'torch'")
        return None
    budget = DEFAULT_MEMORY_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes
    itemsize = 8 if hidden.dtype == torch.float64 else 4
    copies = _LIVE_COPIES_TWO_HEADS if two_heads else _LIVE_COPIES
    return max(1, int(budget // (copies * weight.shape[0] * itemsize)))


def _check_scored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
) -> None:
    checks.check_head(hidden, weight, bias)
    checks.check_targets(targets, hidden, weight.shape[0], ignore_index)
    checks.check_temperature(temperature, hidden)
    if softcap is not None:
        checks.check_number("softcap", softcap, above=0.0)


def _check_weights(token_weights: Tensor | None, normalizer: float | Tensor | None, hidden: Tensor) -> None:
    if token_weights is not None:
        checks.check_vector("token_weights", token_weights, len(hidden), hidden)
    checks.check_normalizer(normalizer)


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl: str,
    kl_coef: float,
    kl_log_ratio_clip: float | None,
) -> None:
    checks.check_number("kl_coef", kl_coef, least=0.0)
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight: expected both or neither; for a shared head pass weight twice")
    if ref_hidden is not None:
        _check_other_head("ref_", ref_hidden, ref_weight, ref_bias, hidden, weight)
        if bias is not None and ref_bias is None:
            raise ValueError("ref_bias: expected as the policy's head has a bias, got none; pass zeros if it has none")
    elif ref_bias is not None:
        raise ValueError("ref_bias: has no effect without ref_hidden and ref_weight; leave it out")
    if ref_logp is not None and ref_hidden is not None:
        raise ValueError("ref_logp and ref_hidden: expected one description of the reference, got both; leave one out")
    if kl == "full" and ref_hidden is None and (kl_coef or ref_logp is not None):
        raise ValueError("kl='full': expected ref_hidden and ref_weight, as log-probs of the targets do not suffice")
    if kl == "full" and kl_log_ratio_clip is not None:
        raise ValueError("kl_log_ratio_clip: has no effect with kl='full', which is exact; leave it out")
    if kl_coef and ref_logp is None and ref_hidden is None:
        raise ValueError(f"kl_coef={kl_coef}: expected ref_logp, or ref_hidden and ref_weight, got no reference")
    if kl_log_ratio_clip is not None:
        checks.check_number("kl_log_ratio_clip", kl_log_ratio_clip, above=0.0)


def _check_ratio(
    hidden: Tensor,
    clip_low: float,
    clip_high: float,
    importance_level: str,
    cu_seqlens: Tensor | None,
    rollout_logp: Tensor | None,
    tis_cap: float | None,
    sequence_mask_cap: float | None,
) -> None:
    checks.check_number("clip_low", clip_low, least=0.0)
    checks.check_number("clip_high", clip_high, least=0.0)
    checks.check_choice("importance_level", importance_level, ("token", "sequence"))
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, hidden)
    elif importance_level == "sequence" or sequence_mask_cap is not None:
        raise ValueError(
            "cu_seqlens: expected the edges of the sequences for importance_level='sequence' and for "
            "sequence_mask_cap, got none"
        )
    for name, cap in (("tis_cap", tis_cap), ("sequence_mask_cap", sequence_mask_cap)):
        if cap is not None:
            checks.check_number(name, cap, above=0.0)
            if rollout_logp is None:
                raise ValueError(f"{name}: expected rollout_logp, the log-probs of the rollout engine, got none")


def _check_other_head(
    prefix: str, other: Tensor, other_weight: Tensor, other_bias: Tensor | None, hidden: Tensor, weight: Tensor
) -> None:
    """A second model's hidden states and head: its own D, the same T, V and device."""
    checks.check_head(other, other_weight, other_bias, prefix=prefix)
    if len(other) != len(hidden) or len(other_weight) != len(weight):
        raise ValueError(
            f"{prefix}hidden and {prefix}weight: expected T={len(hidden)} rows and V={len(weight)}, "
            f"got {len(other)} and {len(other_weight)}"
        )
    checks.check_device(f"{prefix}hidden", other, hidden)


def _check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
) -> None:
    given = [
        teacher_hidden is not None or teacher_weight is not None,
        teacher_logits is not None,
        teacher_topk is not None,
    ]
    if sum(given) != 1:
        raise ValueError(
            "teacher: expected exactly one of teacher_hidden + teacher_weight, teacher_logits, teacher_topk, "
            f"got {sum(given)}"
        )
    if given[0]:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("teacher_hidden and teacher_weight: expected both, got one")
        _check_other_head("teacher_", teacher_hidden, teacher_weight, None, hidden, weight)
    elif given[1]:
        checks.check_matrix("teacher_logits", teacher_logits, (len(hidden), len(weight)), hidden)
    else:
        values, ids = teacher_topk
        checks.check_matrix("teacher_topk[0]", values, (len(hidden), ids.shape[-1]), hidden)
        if ids.shape != values.shape or ids.dtype != torch.int64:
            raise ValueError(f"teacher_topk[1]: expected int64 {list(values.shape)}, got {ids.dtype} {list(ids.shape)}")
        checks.check_index("teacher_topk[1]", ids.flatten(), None, len(weight), hidden)
