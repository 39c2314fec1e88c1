"""Compute the divergence between a teacher's and a student's distributions from the student's hidden states.

Forward also computes the gradients: 6TDV of work (4TDV with a frozen head), and 2TDV more if the teacher is passed as
hidden states and a head. Logits that the loss computes, for student or teacher, exist for one chunk at a time.
"""

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype
from . import autograd, reference
from .arguments import execution_of, per_row_temperature
from .policy_formula import row_weights, scored_of


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
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Compute a divergence between a teacher's distribution p and the student's distribution q, per row and weighted.

    loss = sum over rows of token_weights * divergence(p, q) / normalizer

    Pass exactly one teacher: teacher_hidden with teacher_weight, teacher_logits, or teacher_topk.

    Args:
        hidden: the student's hidden states, [T, D], floating. Only hidden and weight receive gradients.
        weight: the student's head, [V, D], dtype of hidden.
        teacher_hidden: the teacher's hidden states, [T, D'].
        teacher_weight: the teacher's head, [V, D'].
        teacher_logits: the teacher's logits, [T, V].
        teacher_topk: (logits or log-probs [T, k], ids [T, k] int64). Both sides are renormalized over these k ids.
        kind: "forward_kl": KL(p||q). "reverse_kl": KL(q||p). "jsd": alpha KL(p||m) + (1-alpha) KL(q||m) with
            m = alpha p + (1-alpha) q. "skew_kl": KL(p||m).
        alpha: share of p in m, in (0, 1), for "jsd" (None means 0.5) and "skew_kl" (None means 0.1) only.
        vocab_clip: upper bound of each entry's summand of the divergence, in nats, above 0: a row's divergence is then
            sum over v of min(summand_v, vocab_clip), and a clipped summand has no gradient. The summand of forward_kl
            is p_v (log p_v - log q_v). With teacher_topk, the entries are the k ids. None: no bound.
        temperature: divides the logits of both sides; above 0, one number or one per row, [T]. The loss is not
            multiplied by its square.
        token_weights: weight of each row, [T], floating; a constant. Rows with weight 0 are skipped. None means 1.
        normalizer: divisor of the sum, a number or a tensor with one element. None means the sum of token_weights, or
            T without token_weights. 0 is treated as 1.
        impl: see rmsd_fast.losses.
        memory_budget_bytes: see rmsd_fast.losses.
    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, devices or values do not match, or there is not exactly one teacher.
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    """
    checks.check_head(hidden, weight)
    checks.check_temperature(temperature, hidden)
    checks.check_weights(token_weights, normalizer, hidden)
    checks.check_choice("kind", kind, ("forward_kl", "reverse_kl", "jsd", "skew_kl"))
    if alpha is not None:
        if kind not in ("jsd", "skew_kl"):
            raise ValueError(f"alpha: has no effect with kind={kind!r}; leave it out")
        checks.check_number("alpha", alpha, above=0.0)
        if alpha >= 1:
            raise ValueError(f"alpha: expected a number in (0, 1), got {alpha!r}")
    if vocab_clip is not None:
        checks.check_number("vocab_clip", vocab_clip, above=0.0)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_logits, teacher_topk)
    execution = execution_of(impl, memory_budget_bytes)
    if impl == "reference":
        return reference.linear_divergence(
            hidden,
            weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_logits=teacher_logits,
            teacher_topk=teacher_topk,
            kind=kind,
            alpha=alpha,
            vocab_clip=vocab_clip,
            temperature=temperature,
            token_weights=token_weights,
            normalizer=normalizer,
        )
    teacher = teacher_hidden if teacher_hidden is not None else teacher_logits
    ids = None
    if teacher_topk is not None:
        teacher, ids = teacher_topk
    placeholder = torch.empty(len(hidden), device=hidden.device)
    scored = scored_of(placeholder, None, None, accumulation_dtype(hidden))
    weights = row_weights(scored, token_weights, normalizer, scored.count.dtype).expand(len(hidden)).contiguous()
    return autograd.divergence(
        hidden,
        weight,
        teacher=teacher.detach(),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        topk_ids=ids,
        temperature=per_row_temperature(temperature, hidden),
        kind=kind,
        alpha=alpha,
        vocab_clip=vocab_clip,
        scale=weights,
        skip_zero_scale=token_weights is not None,
        execution=execution,
    )


def _check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
) -> None:
    present = [
        teacher_hidden is not None or teacher_weight is not None,
        teacher_logits is not None,
        teacher_topk is not None,
    ]
    if sum(present) != 1:
        raise ValueError(
            "teacher: expected exactly one of teacher_hidden + teacher_weight, teacher_logits, teacher_topk, "
            f"got {sum(present)}"
        )
    if present[0]:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("teacher_hidden and teacher_weight: expected both, got only one of them")
        checks.check_other_head("teacher_", teacher_hidden, teacher_weight, None, hidden, weight)
    elif present[1]:
        checks.check_matrix("teacher_logits", teacher_logits, (len(hidden), len(weight)), hidden)
    else:
        values, ids = teacher_topk
        checks.check_matrix("teacher_topk[0]", values, (len(hidden), ids.shape[-1]), hidden)
        if ids.shape != values.shape or ids.dtype != torch.int64:
            raise ValueError(f"teacher_topk[1]: expected int64 {list(values.shape)}, got {ids.dtype} {list(ids.shape)}")
        checks.check_index("teacher_topk[1]", ids.flatten(), None, len(weight), hidden)
