"""Log-probability and entropy of targets straight from hidden states, without a [T, V] tensor beyond the budget.

    logp[t] = z[y_t] - log sum_v exp z_v,  z = softcapped (hidden[t] @ weight.T + bias) / temperature[t]

Work: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained one; where the logits do not fit the budget,
8TDV with a trained head and 6TDV with a frozen one whose entropy is differentiated too. The loop is in `loops`, its
gradient in `autograd`, the formula in `reference`.
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
    """Log-probability of each target, and on request the entropy, of log_softmax(softcapped logits / temperature).

    Args:
        hidden: [T, D], float. weight: [V, D], same dtype. bias: [V]. targets: [T], int64.
        temperature: one for all rows or one per row, [T]; above 0.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature.
        ignore_index: rows with this target give 0 and no gradient, whatever their hidden state holds. None: there are
            none, which spares CUDA a wait.
        impl, memory_budget_bytes: see rmsd_fast.losses. Logits are kept for backward where all T fit the budget, else
            computed again (8TDV instead of 6TDV).
    Returns:
        logp [T], or (logp [T], entropy [T]); both differentiable, logp never above 0.
    Raises:
        ValueError: shapes, devices or values do not fit; targets out of range (CPU; elsewhere they give NaN).
        TypeError: dtypes do not fit. RuntimeError: impl is not available.
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
