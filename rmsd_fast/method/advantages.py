"""Group-relative advantages: rewards of the N rollouts of one question, centered and scaled within the group.

Source: R-MSD (arXiv 2603.11423) does not specify the advantage; this is GRPO as in GAD (arXiv 2511.10643).
"""

import torch
from torch import Tensor

# A spread of rewards below this fraction of max(1, |mean|) is a rounding error.
DEGENERATE_SPREAD = 1e-6
# Added to the standard deviation before dividing by it.
EPS = 1e-6


def group_advantages(reward: Tensor, *, eps: float = EPS) -> Tensor:
    """Return (r - mean) / (sd + eps) over the last axis, with the unbiased standard deviation.

    A degenerate group (N = 1, or max - min <= 1e-6 * max(1, |mean|)) gives exact zeros. A reward that is not finite
    makes its whole group NaN, which the non-finite guard of the training step detects.

    Args:
        reward: rewards, [N], or [..., N] for several groups of equal size.
        eps: added to the standard deviation, > 0.
    Returns:
        Advantages in the shape of reward, computed in float64. They have the dtype of reward if it is float32 or
        float64, otherwise float32.
    Raises:
        ValueError: reward has no axis or an empty group, or eps is not above 0.
    """
    if reward.ndim == 0 or reward.shape[-1] == 0:
        raise ValueError(f"reward: expected shape [..., N] with N >= 1, got {list(reward.shape)}")
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps!r}")
    dtype = reward.dtype if reward.dtype in (torch.float32, torch.float64) else torch.float32
    if reward.shape[-1] == 1:
        return torch.zeros_like(reward, dtype=dtype)
    values = reward.double()
    centered = values - values.mean(dim=-1, keepdim=True)
    scaled = centered / (values.std(dim=-1, keepdim=True, unbiased=True) + eps)
    return torch.where(degenerate_groups(values).unsqueeze(-1), torch.zeros_like(scaled), scaled).to(dtype)


def degenerate_groups(reward: Tensor) -> Tensor:
    """Return which groups carry no signal: bool, in the shape of reward without its last axis."""
    values = reward.double()
    if values.shape[-1] == 1:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    spread = values.amax(dim=-1) - values.amin(dim=-1)
    tolerance = DEGENERATE_SPREAD * values.mean(dim=-1).abs().clamp(min=1.0)
    # Without isfinite, inf <= inf would make a group with an infinite reward degenerate and replace it by zeros.
    return (spread <= tolerance) & spread.isfinite()
