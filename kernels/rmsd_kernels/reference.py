"""Reference implementations of all losses in eager torch, against which the kernels are tested."""

from .discriminator.reference import discriminator_loss, last_token_values, pairwise_discriminator_loss
from .heads.reference import linear_cross_entropy, linear_divergence, linear_logprob, linear_policy_loss, linear_topk

__all__ = [
    "discriminator_loss",
    "last_token_values",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "linear_topk",
    "pairwise_discriminator_loss",
]
