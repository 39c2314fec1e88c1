"""Compute the composite reward of stage 2 and the advantages derived from it.

    R(S_i) = alpha * D(S_i) + beta * R_outer(S_i) + eta * R_task(S_i) + delta * R_content(S_i) [- c * log_ratio(S_i)]

R_outer and R_task are 0 or 1 (method.answers). R_content is the task's metric (method.quality), 0 for open questions. D
is the discriminator's score, which is unbounded and has no fixed zero point. A question without teacher responses has
no discriminator reward; pass zeros as its d_score. c is `kl_in_reward`. If it is above 0, log_ratio is the k1 estimate
of the KL to the reference: log pi - log ref of the rollout, averaged over its tokens.

Sources: R-MSD (arXiv 2603.11423) for the reward and its weights, and PRISM (arXiv 2604.28123) for normalizing each
component first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .advantages import EPS, group_advantages


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the four reward components, finite and >= 0.

    The defaults are stated in R-MSD (arXiv 2603.11423): 0.4 / 0.1 / 0.1 / 0.4.

    Attributes:
        alpha: weight of the discriminator score.
        beta: weight of the outer format.
        eta: weight of the task format.
        delta: weight of the content.
    """

    alpha: float = 0.4
    beta: float = 0.1
    eta: float = 0.1
    delta: float = 0.4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"reward weight {field.name}: expected a finite number >= 0, got {value!r}")


def composite_reward(
    d_score: Tensor,
    outer: Tensor,
    task: Tensor,
    content: Tensor,
    *,
    weights: RewardWeights | Mapping[str, float],
    log_ratio: Tensor | None = None,
    kl_in_reward: float = 0.0,
) -> Tensor:
    """Return the weighted sum of the four components, minus the KL penalty.

    Args:
        d_score: discriminator scores, [N] or [..., N]. Bool and integer tensors are accepted.
        outer: outer-format rewards, same shape.
        task: task-format rewards, same shape.
        content: content rewards, same shape.
        weights: RewardWeights, or a mapping with exactly the keys alpha, beta, eta, delta.
        log_ratio: k1 estimates, same shape. Read only if kl_in_reward is above 0.
        kl_in_reward: weight of log_ratio.
    Returns:
        Rewards, same shape, in the dtype of d_score if that is float32 or float64, otherwise float32.
    Raises:
        ValueError: shapes differ, or weights are incomplete, unknown or negative.
    """
    components, dtype = _components(d_score, outer, task, content)
    reward = _weighted_sum(components, weights).to(dtype)
    return reward - kl_in_reward * log_ratio if kl_in_reward else reward


def composite_advantages(
    d_score: Tensor,
    outer: Tensor,
    task: Tensor,
    content: Tensor,
    *,
    weights: RewardWeights | Mapping[str, float],
    normalization: str = "gn_then_sum",
    score_sd_offset: float = 0.0,
    log_ratio: Tensor | None = None,
    kl_in_reward: float = 0.0,
) -> Tensor:
    """Return the advantages of one group from its reward components.

    "gn_then_sum" computes group advantages of each component (zeros for a constant component) and returns their
    weighted sum. The scores of D are divided by sd + score_sd_offset. With an offset of 0 the scale of D does not
    matter; with a larger one, scores that hardly differ have little weight. "sum_then_gn" returns the group advantages
    of the weighted sum, the literal reading of the paper, and ignores the offset. The KL penalty is treated as an
    additional component.

    Arguments, shapes and errors are the same as for composite_reward. An unknown normalization also raises ValueError.
    """
    components, dtype = _components(d_score, outer, task, content)
    if normalization == "gn_then_sum":
        d_score, *others = components
        scaled = [group_advantages(d_score, eps=EPS + score_sd_offset), *map(group_advantages, others)]
        advantages = _weighted_sum(scaled, weights).to(dtype)
        return advantages - kl_in_reward * group_advantages(log_ratio) if kl_in_reward else advantages
    if normalization == "sum_then_gn":
        reward = _weighted_sum(components, weights)
        if kl_in_reward:
            reward = reward.to(dtype) - kl_in_reward * log_ratio
        return group_advantages(reward).to(dtype)
    raise ValueError(f"normalization: expected 'gn_then_sum' or 'sum_then_gn', got {normalization!r}")


def _components(d_score: Tensor, outer: Tensor, task: Tensor, content: Tensor) -> tuple[list[Tensor], torch.dtype]:
    named = {"d_score": d_score, "outer": outer, "task": task, "content": content}
    for name, component in named.items():
        if component.shape != d_score.shape:
            raise ValueError(
                f"{name}: expected the shape of d_score, {list(d_score.shape)}, got {list(component.shape)}"
            )
    dtype = d_score.dtype if d_score.dtype in (torch.float32, torch.float64) else torch.float32
    return [component.double() for component in named.values()], dtype


def _weighted_sum(components: list[Tensor], weights: RewardWeights | Mapping[str, float]) -> Tensor:
    if not isinstance(weights, RewardWeights):
        expected = [field.name for field in fields(RewardWeights)]
        if sorted(weights) != sorted(expected):
            raise ValueError(f"weights: expected the keys {', '.join(expected)}, got {', '.join(map(str, weights))}")
        weights = RewardWeights(**weights)
    values = (weights.alpha, weights.beta, weights.eta, weights.delta)
    # A weight of 0 disables its component, even if the component is not finite.
    terms = [value * component for value, component in zip(values, components, strict=True) if value != 0]
    return torch.stack(terms).sum(dim=0) if terms else torch.zeros_like(components[0])
