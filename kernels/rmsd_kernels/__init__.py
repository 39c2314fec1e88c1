"""Fused losses: public functions, their reference forms (`reference`) and compiled ops (`native`).

Depends on torch, never on rmsd_fast; nothing compiled is loaded on import. `rmsd_fast.losses` documents them.
"""

from .discriminator import discriminator_loss, last_token_values, pairwise_discriminator_loss
from .linear_cross_entropy import linear_cross_entropy
from .linear_divergence import linear_divergence
from .linear_logprob import linear_logprob
from .linear_policy_loss import linear_policy_loss
from .policy_formula import PolicyLoss
from .reference import DiscriminatorLoss, DiscriminatorOutput

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
