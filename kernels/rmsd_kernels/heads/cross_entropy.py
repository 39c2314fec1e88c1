"""Cross entropy straight from hidden states: forward makes the gradients too, 6TDV (4TDV with a frozen head).

It is the policy loss with advantage 1 on-policy: its gradient by logp is -token_weights / normalizer.
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
    """Sum over scored rows of -token_weights * logp, divided by normalizer: a scalar.

    Args beyond linear_logprob:
        token_weights: [T]. normalizer: None = number of scored rows, or the sum of their token_weights where given.
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
        # A row of weight 0 carries no loss and is left out like an ignored one.
        call = call._replace(targets=torch.where(weights == 0, ignore_index, targets))
    terms = PolicyTerms(scale=weights, advantage=torch.ones_like(weights))
    scores, carrier = autograd.one_pass(call, terms, execution)
    return (-scores.logp * weights).sum() + carrier
