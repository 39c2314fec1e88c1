"""Divergence between a teacher's and a student's distributions straight from the student's hidden states.

Forward makes the gradients too: 6TDV (4TDV with a frozen head), and 2TDV more where the teacher is given as hidden
states and a head. Logits of both sides exist for one chunk at a time.
"""

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype
from . import autograd, reference
from .arguments import execution_of, temperature_of_rows
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
    checks.check_weights(token_weights, normalizer, hidden)
    checks.check_choice("kind", kind, ("forward_kl", "reverse_kl", "jsd", "skew_kl"))
    if alpha is not None:
        if kind not in ("jsd", "skew_kl"):
            raise ValueError(f"alpha: has no effect with kind={kind!r}; leave it out")
        checks.check_number("alpha", alpha, above=0.0)
        if alpha >= 1:
            raise ValueError(f"alpha: expected a number in (0, 1), got {alpha!r}")
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
            temperature=temperature,
            token_weights=token_weights,
            normalizer=normalizer,
        )
    teacher = teacher_hidden if teacher_hidden is not None else teacher_logits
    ids = None
    if teacher_topk is not None:
        teacher, ids = teacher_topk
    every = torch.empty(len(hidden), device=hidden.device)
    scored = scored_of(every, None, None, accumulation_dtype(hidden))
    weights = row_weights(scored, token_weights, normalizer, scored.count.dtype).expand(len(hidden)).contiguous()
    return autograd.divergence(
        hidden,
        weight,
        teacher=teacher.detach(),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        topk_ids=ids,
        temperature=temperature_of_rows(temperature, hidden),
        kind=kind,
        alpha=alpha,
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
        checks.check_other_head("teacher_", teacher_hidden, teacher_weight, None, hidden, weight)
    elif given[1]:
        checks.check_matrix("teacher_logits", teacher_logits, (len(hidden), len(weight)), hidden)
    else:
        values, ids = teacher_topk
        checks.check_matrix("teacher_topk[0]", values, (len(hidden), ids.shape[-1]), hidden)
        if ids.shape != values.shape or ids.dtype != torch.int64:
            raise ValueError(f"teacher_topk[1]: expected int64 {list(values.shape)}, got {ids.dtype} {list(ids.shape)}")
        checks.check_index("teacher_topk[1]", ids.flatten(), None, len(weight), hidden)
