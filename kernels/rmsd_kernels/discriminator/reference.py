"""Reference implementations of the discriminator losses in eager torch, in the dtype of the inputs.

Every kernel is tested against this file. Sums and results are float64 for float64 inputs and float32 otherwise.
The public functions check the arguments.

Symbols: T tokens, D hidden, B sequences, S rollout scores, R teacher scores, P pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.reference import weighted_sum
from ..ops import accumulation_dtype


class DiscriminatorLoss(NamedTuple):
    """Result of pairwise_discriminator_loss.

    loss is a scalar with a gradient. accuracy and margin are detached scalars, weighted by pair_weight; without pairs
    they are 0.
    """

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


class DiscriminatorOutput(NamedTuple):
    """DiscriminatorLoss, and the detached scores [S+R] from which it was computed, in the order of last_index."""

    loss: Tensor
    accuracy: Tensor
    margin: Tensor
    scores: Tensor


def last_token_values(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Apply the value head to the chosen rows, [B]: gather, optional RMSNorm, dot product. See the public function."""
    dtype = accumulation_dtype(hidden)
    rows = hidden[last_index].to(dtype)
    if norm_weight is not None:
        rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    values = (rows * weight.to(dtype)).sum(dim=-1)
    return values if bias is None else values + bias.to(dtype)


def pairwise_discriminator_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorLoss:
    """Return sum(pair_weight * quality * softplus(S - T)) / normalizer + score_l2 * mean square.

    See the public function.
    """
    dtype = accumulation_dtype(student_scores)
    student, teacher = student_scores.to(dtype), teacher_scores.to(dtype)
    margin = teacher[teacher_index] - student[student_index]
    weights = None if pair_weight is None else pair_weight.detach().to(dtype)
    # softplus(S - T) = -log sigmoid(T - S). torch's softplus becomes the identity above 20; logsigmoid is exact.
    loss = weighted_sum(-F.logsigmoid(margin) * quality.detach().to(dtype), weights, normalizer)
    if score_l2:
        squares = torch.cat([student, teacher]).square()
        loss = loss + score_l2 * weighted_sum(squares, None, l2_normalizer)
    margin = margin.detach()
    accuracy = weighted_sum((margin > 0).to(dtype), weights, None)
    return DiscriminatorLoss(loss, accuracy, weighted_sum(margin, weights, None))


def discriminator_loss(
    hidden: Tensor,
    last_index: Tensor,
    head: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    num_students: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorOutput:
    """Apply last_token_values to all responses, then pairwise_discriminator_loss. See the public function."""
    scores = last_token_values(hidden, last_index, head, bias=bias, norm_weight=norm_weight, norm_eps=norm_eps)
    result = pairwise_discriminator_loss(
        scores[:num_students],
        scores[num_students:],
        student_index,
        teacher_index,
        quality,
        pair_weight=pair_weight,
        score_l2=score_l2,
        normalizer=normalizer,
        l2_normalizer=l2_normalizer,
    )
    return DiscriminatorOutput(*result, scores.detach())
