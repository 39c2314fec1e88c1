"""Fused losses: public functions, their reference forms (`reference`) and compiled ops (`native`).

Depends on torch, never on rmsd_fast; nothing compiled is loaded on import. `rmsd_fast.losses` documents them.
"""

from .discriminator import discriminator_loss, last_token_values, pairwise_discriminator_loss
from .linear_losses import linear_cross_entropy, linear_divergence, linear_logprob, linear_policy_loss
from .reference import DiscriminatorLoss, DiscriminatorOutput, PolicyLoss

__all__ = [
    "DiscriminatorLoss",
    "DiscriminatorOutput",
    "PolicyLoss",
    "discriminator_loss",
    "last_token_values",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "pairwise_discriminator_loss",
]
