"""Fused losses (with their reference forms, `reference`, and compiled ops, `native`) and shared-prefix attention.

Depends on torch, never on rmsd_fast; nothing compiled is loaded on import. `rmsd_fast.losses` documents them.
"""

from .discriminator import discriminator_loss, last_token_values, pairwise_discriminator_loss
from .linear_cross_entropy import linear_cross_entropy
from .linear_divergence import linear_divergence
from .linear_logprob import linear_logprob
from .linear_policy_loss import linear_policy_loss
from .policy_formula import PolicyLoss
from .reference import DiscriminatorLoss, DiscriminatorOutput
from .shared_prefix import SharedPrefixPlan, shared_prefix_attention
from .shared_prefix_backends import attention_calls
from .shared_prefix_decode import DecodePlan, shared_prefix_decode

__all__ = [
    "DecodePlan",
    "DiscriminatorLoss",
    "DiscriminatorOutput",
    "PolicyLoss",
    "SharedPrefixPlan",
    "attention_calls",
    "discriminator_loss",
    "last_token_values",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "pairwise_discriminator_loss",
    "shared_prefix_attention",
    "shared_prefix_decode",
]
