"""The composite reward of stage 2 and the advantages that are made of it.

    R(S_i) = alpha * D(S_i) + beta * R_outer(S_i) + eta * R_task(S_i) + delta * R_content(S_i) [- c * log_ratio(S_i)]

R_outer and R_task are 0/1 (method.answers), R_content is the task's metric (method.quality; 0 for open questions), D is
the discriminator's score, unbounded and without a fixed level. A question without teacher responses has no D reward:
give zeros for its d_score. Where `kl_in_reward`, c, is above 0, log_ratio is the k1 estimate of the KL to the
reference: log pi - log ref of the rollout, mean over its tokens.

Sources: R-MSD (arXiv 2603.11423), reward and its weights; normalising each component first: PRISM (arXiv 2604.28123).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .advantages import group_advantages


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the four reward components (stated: 0.4 / 0.1 / 0.1 / 0.4; R-MSD, arXiv 2603.11423).

    alpha: discriminator score. beta: outer format. eta: task format. delta: content. Finite and >= 0.
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
    """The plain weighted sum of the four components, minus the penalty on the KL.

    Args:
        d_score, outer, task, content: [N] or [..., N], all of one shape; bool and integers are accepted.
        weights: RewardWeights, or a mapping with exactly the keys alpha, beta, eta, delta.
        log_ratio: of the same shape; read where kl_in_reward is above 0.
        kl_in_reward: weight of log_ratio.
    Returns:
        Same shape; d_score's dtype where that is float32 or float64, else float32.
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
    log_ratio: Tensor | None = None,
    kl_in_reward: float = 0.0,
) -> Tensor:
    """Advantages of one group from its reward components.

    "gn_then_sum": each component becomes group advantages of its own (a constant one becomes zeros), their weighted sum
    is the advantage; the scale of D then does not matter. "sum_then_gn": group advantages of the weighted sum, the
    literal reading of the paper. The penalty on the KL counts as one more component.

    Arguments, shapes and errors as composite_reward; ValueError also for another normalization.
    """
    components, dtype = _components(d_score, outer, task, content)
    if normalization == "gn_then_sum":
        advantages = _weighted_sum([group_advantages(component) for component in components], weights).to(dtype)
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
    # A weight of 0 switches its component off, also where that component is not finite.
    terms = [value * component for value, component in zip(values, components, strict=True) if value != 0]
    return torch.stack(terms).sum(dim=0) if terms else torch.zeros_like(components[0])
