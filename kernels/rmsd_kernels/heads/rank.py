"""Compute the rank of targets among the logits of a head, with logits within a memory budget.

    rank[t] = number of v with z_v > z_{y_t},  z = hidden[t] @ weight.T + bias

Work: 2TDV, and one comparison per logit. A positive temperature and a softcap do not change ranks.
"""

import torch
from torch import Tensor

from .. import checks
from .arguments import execution_of
from .chunks import Loop


def linear_rank(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Count the tokens that a language model finds more probable than each target.

    A target is among the k most probable tokens if its rank is below k. Tokens with the target's logit do not count,
    so equal logits in 16 bits can put more than k tokens among the first k.

    Args:
        hidden: hidden states, [T, D], floating; without a gradient.
        weight: the head, [V, D], dtype of hidden.
        targets: target ids, [T], int64. On accelerators, a target out of range has rank V.
        bias: bias of the head, [V], floating.
        memory_budget_bytes: see rmsd_fast.losses.
    Returns:
        Ranks in 0..V, int64 [T]. Logits that are NaN count as larger, so a target whose logit is NaN has rank V.
    Raises:
        ValueError: shapes, devices or values do not match, or targets are out of range (checked for CPU tensors).
        TypeError: a dtype does not match.
    """
    checks.check_head(hidden, weight, bias)
    checks.check_targets(targets, hidden, len(weight), None)
    execution = execution_of("torch", memory_budget_bytes)
    ranks = torch.empty_like(targets)
    with torch.no_grad(), Loop(hidden, weight, None, execution, buffers=1 + (bias is not None), bias=bias) as loop:
        workspace = loop.workspace()
        for span, _ in loop:
            rows, ids = hidden[span], targets[span, None]
            logits = torch.mm(rows, weight.t(), out=workspace[: len(rows)])
            if loop.bias is not None:
                logits = logits + loop.bias
            known = ids.clamp(0, len(weight) - 1)
            below = (logits <= logits.gather(1, known)).sum(dim=1)
            ranks[span] = torch.where(known[:, 0] == ids[:, 0], len(weight) - below, len(weight))
    return ranks
