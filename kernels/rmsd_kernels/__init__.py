"""Fused losses (with their reference forms, `reference`, and compiled ops, `native`), shared-prefix attention, patches
of video frames.

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
from .video_patches import resize_frames, video_patches

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
    "resize_frames",
    "shared_prefix_attention",
    "shared_prefix_decode",
    "video_patches",
]
