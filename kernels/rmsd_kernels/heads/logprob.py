"""Compute log-probability and entropy of targets from hidden states, with logits within a memory budget.

    logp[t] = z[y_t] - log sum_v exp z_v,  z = softcapped (hidden[t] @ weight.T + bias) / temperature[t]

Work: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained head. If the logits do not fit into the
budget, a trained head takes 8TDV, and a frozen head whose entropy is differentiated takes 6TDV. The loop is in `loops`,
its gradient is in `autograd`, and the formula is in `reference`.
"""

from torch import Tensor

from .. import checks
from . import autograd, reference
from .arguments import execution_of, head_call


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
    impl: str = "auto",
    memory_budget_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probability of each target, and optionally the entropy, from hidden states.

    Same as log_softmax(softcapped logits / temperature) at the targets.

    Args:
        hidden: hidden states, [T, D], floating.
        weight: the head, [V, D], dtype of hidden.
        targets: target ids, [T], int64.
        bias: bias of the head, [V], floating.
        temperature: divides the logits; above 0, one number or one per row, [T].
        softcap: replaces logits by softcap * tanh(logits / softcap), before the temperature.
        ignore_index: rows with this target give 0 and no gradient, even if their hidden state holds NaN. None: every
            row is scored, and on CUDA the call does not wait for the device.
        return_entropy: whether to also return the entropy.
        impl: see rmsd_fast.losses.
        memory_budget_bytes: see rmsd_fast.losses. If the logits of all T rows fit into the budget, they are kept for
            backward; otherwise backward recomputes them (8TDV of work instead of 6TDV).
    Returns:
        logp [T], or (logp [T], entropy [T]), float32 (float64 for float64 inputs). Both are differentiable; logp is
        never above 0.
    Raises:
        ValueError: shapes, devices or values do not match. Targets out of range raise for CPU tensors; on other devices
            they give NaN.
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    """
    checks.check_scored(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    execution = execution_of(impl, memory_budget_bytes)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if impl == "reference":
        return reference.linear_logprob(
            hidden,
            weight,
            targets,
            **head,
            return_entropy=return_entropy,
        )
    call = head_call(hidden, weight, targets, **head)
    scores = autograd.score(call, execution, entropy_grad=return_entropy)
    return (scores.logp, scores.entropy) if return_entropy else scores.logp
