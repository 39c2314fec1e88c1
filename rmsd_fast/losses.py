"""Losses on the hidden states of a language model, for any trainer; importing this loads torch only.

Functions, and nn.Module forms that keep the settings (modules own no parameters; heads are passed to forward):

| function                      | module                      | value                                               |
|-------------------------------|-----------------------------|-----------------------------------------------------|
| `linear_logprob`              | `LinearLogprob`             | log-prob of each target, entropy                    |
| `linear_cross_entropy`        | `LinearCrossEntropy`        | weighted negative log-likelihood                    |
| `linear_policy_loss`          | `LinearPolicyLoss`          | clipped policy gradient + KL - entropy              |
| `linear_divergence`           | `LinearDivergence`          | forward/reverse KL, JSD, skew KL against a teacher  |
| `last_token_values`           | `LastTokenValues`           | scalar head on the last response tokens             |
| `pairwise_discriminator_loss` | `PairwiseDiscriminatorLoss` | quality-weighted pair loss                          |
| `discriminator_loss`          | `DiscriminatorHeadLoss`     | the two above in one call                           |

`impl` chooses how a loss is computed, with the same numbers:

- "triton": CUDA. GEMMs of torch over chunks of tokens, and one Triton kernel per chunk that reads its logits and leaves
  their gradient in their place. The discriminator losses are one kernel forward and one backward.
- "native": CPU, float32 and bfloat16: the same loop with the compiled row functions of csrc/.
- "torch": any device and dtype: the same loop in eager torch.
- "reference": eager torch, all rows at once (rmsd_kernels.reference): the truth that others are tested against.
- "auto": "triton" for CUDA tensors (float64: "torch"); for CPU tensors "native" where that was built, else "torch".

`memory_budget_bytes` bounds the logits that exist at once (at least one row). Each chunk more than the default's costs
a little time; losses whose gradient is known only in backward keep all logits where they fit it, else make them again.
Default: 512 MiB for each head on CUDA, 256 MiB on CPU; kept up to 512 MiB and 1 GiB. A 16-bit trained head gets more,
so that its gradient is summed over at most 5 chunks (beyond that in float32: 4*V*D bytes, 6*V*D at its end).

On CUDA, rows that are to be ignored are looked up on the device, which waits for it up to three times per call;
`ignore_index=None` says that every row is scored and waits for nothing. Cross entropy, policy loss and divergence make
their gradients in forward. That costs its work also where backward never comes, twice under activation checkpointing,
and holds the gradients of hidden states and head until backward, which uses them up: one backward per loss, and no
second derivatives (impl="reference" has both). Autocast has no effect: the losses compute in the dtype of their inputs.
torch.compile takes them whole (fullgraph), with lengths that change; its dynamic=True, which makes symbols of Python
floats too, fails on the policy loss in torch 2.13.

An implementation that cannot serve the call raises RuntimeError. Results are float32, or float64 for float64
inputs. Only hidden states, weights, biases, norm weights and scores receive gradients; advantages, quality, weights of
tokens and pairs, log-probs of other policies and everything of a teacher or reference are constants. A normalizer is a
plain divisor: give the count over all ranks and micro-batches, and the sum of the parts is the loss of the whole. A
normalizer of 0 counts as 1, so that a batch in which nothing is scored has loss 0 and zero gradients.

Sources: R-MSD (arXiv 2603.11423); GRPO as in GAD (arXiv 2511.10643); length-normalised ratios: GSPO (arXiv 2507.18071);
generalised JSD: GKD (arXiv 2306.13649); skew KL: DistiLLM (arXiv 2402.03898).
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
    """Keyword arguments of a loss function, kept; forward takes the rest and may override them."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown settings {', '.join(unknown)}; expected some of {', '.join(known)}"
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
    """Module form of discriminator_loss (DiscriminatorLoss is the name of the pair loss's result)."""

    function = staticmethod(discriminator_loss)
