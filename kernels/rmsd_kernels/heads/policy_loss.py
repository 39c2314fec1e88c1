"""Compute the clipped, KL-regularized policy-gradient loss from hidden states.

Advantages, old and reference log-probs and the normalizer are known before the head runs. The row pass that computes a
row's log-prob can therefore also overwrite its logits with their gradient. This takes 6TDV of work (4TDV with a frozen
head, 2TDV more for a reference head), and logits exist for one chunk at a time. Sequence-level ratios and sequence
masks are known only after all rows of a sequence have been processed. In these cases, forward computes the log-probs,
and backward computes the gradient from kept or recomputed logits.
"""

from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype
from . import autograd, reference
from .arguments import execution_of, head_call
from .policy_formula import (
    PolicyLoss,
    guarded_exp,
    importance_correction,
    policy_loss,
    row_weights,
    scored_of,
)
from .row_types import PolicySettings, PolicyTerms


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
    ignore_index: int | None = -100,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> PolicyLoss:
    """Compute the clipped policy-gradient loss with KL and entropy terms, from hidden states.

    loss = sum over scored rows of token_weights * (-w * min(r*A, clip(r, 1-clip_low, 1+clip_high)*A)
           + kl_coef * KL - entropy_coef * H) / normalizer

    The values of per-row tensors in ignored rows have no effect. Rows with a token weight of 0 are scored: they do not
    contribute to the loss, but are included in the metrics.

    Args:
        hidden: hidden states, [T, D], floating.
        weight: the policy's head, [V, D], dtype of hidden.
        targets: sampled token ids, [T], int64.
        advantages: advantage A of each row, [T], floating.
        old_logp: log-probs under the sampling policy, computed by this trainer, [T], floating; r = exp(logp -
            old_logp). None means on-policy: r has the value 1 and keeps its gradient.
        ref_logp: log-probs under the reference policy, [T], floating. Pass either this or ref_hidden and ref_weight.
        ref_hidden: the reference policy's hidden states, [T, D'].
        ref_weight: the reference policy's head, [V, D'].
        ref_bias: bias of the reference policy's head, [V].
        kl: KL estimate with d = ref_logp - logp: "k1" = -d, "k2" = d²/2, "k3" = exp(d) - d - 1, or "full" = sum_v pi
            (log pi - log ref), which needs ref_hidden. The estimate is differentiated as is, without a ratio weight.
            On-policy, the gradient of k2 is that of KL(pi||ref), and the gradient of k1 is zero in expectation.
        kl_coef: coefficient of the KL, >= 0. If it is 0, a reference only contributes metrics.
        kl_log_ratio_clip: c > 0 clamps d to [-c, c] for k1, k2 and k3. None does not clamp. The argument of exp is
            limited to 80 in any case.
        clip_low: lower clip of the ratio, >= 0.
        clip_high: upper clip of the ratio, >= 0.
        importance_level: "token", or "sequence": r is the exponential of the mean log-ratio over the scored rows of
            the row's sequence.
        cu_seqlens: edges of the packed sequences, [B+1], int32 or int64. Only used for importance_level="sequence" and
            for sequence_mask_cap.
        token_weights: weight of each row, [T], floating; a constant. None means 1.
        rollout_logp: log-probs that the rollout engine returned, [T], floating. They give w =
            min(exp(old_logp - rollout_logp), tis_cap), detached. w only multiplies the policy term, and the normalizer
            does not depend on it.
        tis_cap: upper bound of w, > 0; needs rollout_logp. None means w = 1.
        sequence_mask_cap: w is 0 in sequences whose mean of exp(old_logp - rollout_logp) is above this number, > 0.
        entropy_coef: coefficient of the entropy H.
        normalizer: divisor of the sum, a number or a tensor with one element. None means the sum of the scored rows'
            token_weights, or the number of scored rows without token_weights. 0 is treated as 1.
        bias: bias of the policy's head, [V], floating.
        temperature: divides the logits; above 0, one number or one per row, [T].
        softcap: replaces logits by softcap * tanh(logits / softcap), before the temperature.
        ignore_index: rows with this target are not scored. None: every row is scored.
        impl: see rmsd_fast.losses.
        memory_budget_bytes: see rmsd_fast.losses.
    Returns:
        PolicyLoss(loss, metrics). Metrics are means over scored rows, or 0 if there are none: logp, entropy, mean_ratio
        and clip_fraction; with a reference also kl and kl_k1; with rollout_logp also importance_ratio,
        tis_capped_fraction and sequence_masked_fraction. metrics["rows"] is the number of scored rows, which is needed
        to combine the means of several batches.
    Raises:
        ValueError: shapes, devices or values do not match, targets are out of range (checked for CPU tensors), or an
            argument is missing or has no effect.
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    Source: R-MSD (arXiv 2603.11423) L_RL; unspecified details follow GAD (arXiv 2511.10643).
    """
    checks.check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    checks.check_weights(token_weights, normalizer, hidden)
    per_row = {"advantages": advantages, "old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    for name, values in per_row.items():
        if values is not None or name == "advantages":
            checks.check_vector(name, values, len(hidden), hidden)
    checks.check_choice("kl", kl, ("k1", "k2", "k3", "full"))
    _check_reference(hidden, weight, bias, ref_logp, ref_hidden, ref_weight, ref_bias, kl, kl_coef, kl_log_ratio_clip)
    _check_ratio(hidden, clip_low, clip_high, importance_level, cu_seqlens, rollout_logp, tis_cap, sequence_mask_cap)
    checks.check_number("entropy_coef", entropy_coef)
    policy = {
        "kl": kl,
        "kl_coef": kl_coef,
        "kl_log_ratio_clip": kl_log_ratio_clip,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "importance_level": importance_level,
        "tis_cap": tis_cap,
        "sequence_mask_cap": sequence_mask_cap,
        "entropy_coef": entropy_coef,
    }
    execution = execution_of(impl, memory_budget_bytes)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if impl == "reference":
        return reference.linear_policy_loss(
            hidden,
            weight,
            targets,
            advantages,
            **head,
            old_logp=old_logp,
            ref_logp=ref_logp,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            rollout_logp=rollout_logp,
            normalizer=normalizer,
            **policy,
        )
    settings = PolicySettings.of(**policy)
    call = head_call(hidden, weight, targets, **head)
    if ref_hidden is not None:
        call = call._replace(
            ref_hidden=ref_hidden.detach(),
            ref_weight=ref_weight.detach(),
            ref_bias=None if ref_bias is None else ref_bias.detach(),
            full_kl=kl == "full",
        )
    scored = scored_of(targets, ignore_index, cu_seqlens, accumulation_dtype(hidden))
    weights = row_weights(scored, token_weights, normalizer, scored.count.dtype).expand(len(targets)).contiguous()
    if importance_level == "sequence" or (sequence_mask_cap is not None and old_logp is None):
        scores = autograd.score(call, execution, entropy_grad=entropy_coef != 0)
        carrier = 0.0
    else:
        terms = _row_terms(advantages, old_logp, ref_logp, rollout_logp, weights, scored, settings)
        scores, carrier = autograd.one_pass(call, terms, execution, skip_idle=True)
    entropy = scores.entropy if entropy_coef else scores.entropy.detach()
    result = policy_loss(
        logp=scores.logp,
        entropy=entropy,
        ref_logp=scores.ref_logp if ref_logp is None else ref_logp,
        full_kl=scores.full_kl,
        advantages=advantages,
        old_logp=old_logp,
        rollout_logp=rollout_logp,
        weights=weights,
        scored=scored,
        settings=settings,
    )
    return result._replace(loss=result.loss + carrier)


def _row_terms(advantages, old_logp, ref_logp, rollout_logp, weights, scored, settings: PolicySettings) -> PolicyTerms:
    """Return the per-row inputs of the row pass. The advantage includes the importance correction if it is known."""
    dtype = weights.dtype
    advantage, old, rollout = (scored.clean(t, dtype) for t in (advantages, old_logp, rollout_logp))
    deferred_rollout = None
    if rollout is not None and old is not None:
        advantage = advantage * importance_correction(guarded_exp(old - rollout), scored, settings)[0]
    elif rollout is not None and settings.tis_cap is not None:
        deferred_rollout = rollout
    return PolicyTerms(
        scale=weights,
        advantage=advantage,
        old_logp=old,
        ref_logp=scored.clean(ref_logp, dtype),
        rollout_logp=deferred_rollout,
        settings=settings,
    )


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
        raise ValueError(
            "ref_hidden and ref_weight: expected both or neither, got only one of them; for a shared head pass weight "
            "as ref_weight too"
        )
    if ref_hidden is not None:
        checks.check_other_head("ref_", ref_hidden, ref_weight, ref_bias, hidden, weight)
        if bias is not None and ref_bias is None:
            raise ValueError(
                "ref_bias: expected a tensor because the policy's head has a bias, got None; pass zeros if the "
                "reference's head has no bias"
            )
    elif ref_bias is not None:
        raise ValueError("ref_bias: has no effect without ref_hidden and ref_weight; leave it out")
    if ref_logp is not None and ref_hidden is not None:
        raise ValueError("ref_logp and ref_hidden: expected one description of the reference, got both; leave one out")
    if kl == "full" and ref_hidden is None and (kl_coef or ref_logp is not None):
        raise ValueError(
            "kl='full': expected ref_hidden and ref_weight, because log-probs of the targets alone do not suffice"
        )
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
            "cu_seqlens: expected the edges of the sequences for importance_level='sequence' or sequence_mask_cap, "
            "got None"
        )
    for name, cap in (("tis_cap", tis_cap), ("sequence_mask_cap", sequence_mask_cap)):
        if cap is not None:
            checks.check_number(name, cap, above=0.0)
            if rollout_logp is None:
                raise ValueError(f"{name}: expected rollout_logp, the log-probs of the rollout engine, too, got None")
