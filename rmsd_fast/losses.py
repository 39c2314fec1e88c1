"""Losses on the hidden states of a language model, for any trainer. Importing this module loads torch only.

Each loss is a function, and an nn.Module that stores the settings. Modules own no parameters; pass the head to forward:

| function                      | module                      | value                                               |
|-------------------------------|-----------------------------|-----------------------------------------------------|
| `linear_logprob`              | `LinearLogprob`             | log-prob of each target, entropy                    |
| `linear_cross_entropy`        | `LinearCrossEntropy`        | weighted negative log-likelihood                    |
| `linear_policy_loss`          | `LinearPolicyLoss`          | clipped policy gradient + KL - entropy              |
| `linear_divergence`           | `LinearDivergence`          | forward/reverse KL, JSD, skew KL against a teacher  |
| `last_token_values`           | `LastTokenValues`           | scalar head on the last response tokens             |
| `pairwise_discriminator_loss` | `PairwiseDiscriminatorLoss` | quality-weighted pair loss                          |
| `discriminator_loss`          | `DiscriminatorHeadLoss`     | the two above in one call                           |

`impl` selects the implementation. All of them compute the same loss:

- "triton": CUDA. A loop over chunks of tokens: torch GEMMs, and one Triton kernel per chunk that overwrites the logits
  with their gradient. The discriminator losses use one kernel in forward and one in backward.
- "native": CPU, float32 and bfloat16. The same loop with the compiled row functions of csrc/, which do not implement
  the bound `vocab_clip` of divergences.
- "torch": any device and dtype. The same loop in eager torch.
- "reference": eager torch on all rows at once (rmsd_kernels.reference). The others are tested against it.
- "auto": "triton" for CUDA tensors (float64: "torch"). For CPU tensors: "native" if it was built and implements the
  call, otherwise "torch".

Memory. `memory_budget_bytes` bounds the logits that exist at once; a chunk has at least one row. A smaller budget means
more chunks, and each extra chunk costs a little time. Losses whose gradient is known only in backward keep all logits
if they fit into the budget, and recompute them otherwise. By default, a chunk's logits take up to 512 MiB per head on
CUDA and 256 MiB on CPU, and logits are kept for backward up to 512 MiB on CUDA and 1 GiB on CPU. A trained 16-bit head
gets larger chunks, so that its gradient is summed over at most 5 of them. With more chunks than 5, the gradient is
summed in float32, which takes 4*V*D bytes, and 6*V*D bytes at the end of the call.

Host synchronization. On CUDA, finding the rows to ignore waits for the device, up to three times per call. Pass
`ignore_index=None` if every row is scored; the call then does not wait.

Backward. Cross entropy, policy loss and divergence compute their gradients in forward. This work is done even if
backward is never called, and twice under activation checkpointing. The gradients of hidden states and head are held
until backward, which consumes them. Each loss therefore supports one backward and no second derivatives.
impl="reference" supports repeated backward and second derivatives.

Autocast has no effect: the losses compute in the dtype of their inputs. torch.compile captures them in one graph
(fullgraph=True), even if lengths change. In torch 2.13, dynamic=True fails on the policy loss, because it also
converts Python floats to symbols.

An implementation that does not support a call raises RuntimeError. Results are float32, or float64 for float64 inputs.
Only hidden states, weights, biases, norm weights and scores receive gradients. Advantages, quality, token and pair
weights, log-probs of other policies, and all tensors of a teacher or reference are constants. A normalizer is a plain
divisor: if you pass the count over all ranks and micro-batches, the losses of the micro-batches add up to the loss of
the whole batch. A normalizer of 0 is treated as 1, so a batch without scored rows has loss 0 and zero gradients.

Sources: R-MSD (arXiv 2603.11423); GRPO as in GAD (arXiv 2511.10643); length-normalized ratios: GSPO (arXiv 2507.18071);
generalized JSD: GKD (arXiv 2306.13649); skew KL: DistiLLM (arXiv 2402.03898).
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from rmsd_kernels import (
    DiscriminatorLoss,
    DiscriminatorOutput,
    PolicyLoss,
    discriminator_loss,
    last_token_values,
    linear_cross_entropy,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    pairwise_discriminator_loss,
)

__all__ = [
    "DiscriminatorHeadLoss",
    "DiscriminatorLoss",
    "DiscriminatorOutput",
    "LastTokenValues",
    "LinearCrossEntropy",
    "LinearDivergence",
    "LinearLogprob",
    "LinearPolicyLoss",
    "PairwiseDiscriminatorLoss",
    "PolicyLoss",
    "discriminator_loss",
    "last_token_values",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "pairwise_discriminator_loss",
]


class _LossModule(nn.Module):
    """Store keyword arguments of a loss function; forward takes the other arguments and may override stored ones."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        unknown = sorted(set(settings) - set(allowed))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown settings {', '.join(unknown)}; expected some of {', '.join(allowed)}"
            )
        self.settings = settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **{**self.settings, **kwargs})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearLogprob(_LossModule):
    """Module form of linear_logprob: `LinearLogprob(temperature=0.8)(hidden, weight, targets)`."""

    function = staticmethod(linear_logprob)


class LinearCrossEntropy(_LossModule):
    """Module form of linear_cross_entropy."""

    function = staticmethod(linear_cross_entropy)


class LinearPolicyLoss(_LossModule):
    """Module form of linear_policy_loss."""

    function = staticmethod(linear_policy_loss)


class LinearDivergence(_LossModule):
    """Module form of linear_divergence."""

    function = staticmethod(linear_divergence)


class LastTokenValues(_LossModule):
    """Module form of last_token_values."""

    function = staticmethod(last_token_values)


class PairwiseDiscriminatorLoss(_LossModule):
    """Module form of pairwise_discriminator_loss."""

    function = staticmethod(pairwise_discriminator_loss)


class DiscriminatorHeadLoss(_LossModule):
    """Module form of discriminator_loss. (`DiscriminatorLoss` is the result of the pair loss.)"""

    function = staticmethod(discriminator_loss)
