"""Compute cross entropy from hidden states. Forward also computes the gradients: 6TDV of work (4TDV with a frozen
head).

It equals the on-policy policy loss with advantage 1, because the derivative with respect to logp is
-token_weights/normalizer.
"""

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype
from . import autograd, reference
from .arguments import execution_of, head_call
from .policy_formula import row_weights, scored_of
from .row_types import PolicyTerms


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
    ignore_index: int | None = -100,
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Compute the weighted negative log-likelihood of the targets from hidden states.

    loss = sum over scored rows of -token_weights * logp / normalizer

    Args:
        hidden: hidden states, [T, D], floating.
        weight: the head, [V, D], dtype of hidden.
        targets: target ids, [T], int64.
        token_weights: weight of each row, [T], floating; a constant. None means 1.
        normalizer: divisor of the sum, a number or a tensor with one element. None means the sum of the scored rows'
            token_weights, or the number of scored rows without token_weights. 0 is treated as 1.
        bias: bias of the head, [V], floating.
        temperature: divides the logits; above 0, one number or one per row, [T].
        softcap: replaces logits by softcap * tanh(logits / softcap), before the temperature.
        ignore_index: rows with this target are not scored. None: every row is scored.
        impl: see rmsd_fast.losses.
        memory_budget_bytes: see rmsd_fast.losses.
    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, devices or values do not match, or targets are out of range (checked for CPU tensors).
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    """
    checks.check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    checks.check_weights(token_weights, normalizer, hidden)
    execution = execution_of(impl, memory_budget_bytes)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if impl == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            targets,
            **head,
            token_weights=token_weights,
            normalizer=normalizer,
        )
    call = head_call(hidden, weight, targets, **head)
    scored = scored_of(targets, ignore_index, None, accumulation_dtype(hidden))
    weights = row_weights(scored, token_weights, normalizer, scored.count.dtype).expand(len(targets)).contiguous()
    if token_weights is not None and ignore_index is not None:
        # A row with weight 0 does not contribute to the loss and is skipped like an ignored row.
        call = call._replace(targets=torch.where(weights == 0, ignore_index, targets))
    terms = PolicyTerms(scale=weights, advantage=torch.ones_like(weights))
    scores, carrier = autograd.one_pass(call, terms, execution)
    return (-scores.logp * weights).sum() + carrier
