"""Fused losses, shared-prefix attention, and patches of video frames.

`reference` has reference implementations of the losses, and `native` loads the compiled CPU ops. The package depends on
torch but not on rmsd_fast, and importing it loads no compiled code. `rmsd_fast.losses` documents the losses.
"""

from .discriminator.loss import discriminator_loss, last_token_values, pairwise_discriminator_loss
from .discriminator.reference import DiscriminatorLoss, DiscriminatorOutput
from .heads.cross_entropy import linear_cross_entropy
from .heads.divergence import linear_divergence
from .heads.logprob import linear_logprob
from .heads.policy_formula import PolicyLoss
from .heads.policy_loss import linear_policy_loss
from .heads.rank import linear_rank
from .heads.topk import TopK, linear_topk
from .shared_prefix.attention import SharedPrefixPlan, shared_prefix_attention
from .shared_prefix.backends import attention_calls
from .shared_prefix.decode import DecodePlan, shared_prefix_decode
from .video.patches import resize_frames, video_patches

__all__ = [
    "DecodePlan",
    "DiscriminatorLoss",
    "DiscriminatorOutput",
    "PolicyLoss",
    "SharedPrefixPlan",
    "TopK",
    "attention_calls",
    "discriminator_loss",
    "last_token_values",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "linear_rank",
    "linear_topk",
    "pairwise_discriminator_loss",
    "resize_frames",
    "shared_prefix_attention",
    "shared_prefix_decode",
    "video_patches",
]
