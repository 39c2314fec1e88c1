"""Test group advantages against hand-computed numbers."""

import math

import pytest
import torch

from rmsd_fast.method.advantages import degenerate_groups, group_advantages


def test_two_rollouts():
    # The mean is 1/2 and the unbiased sd sqrt(1/2), which gives ±0.5 / (0.70710678 + 1e-6).
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert group_advantages(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx(
        [-expected, expected], abs=1e-15
    )


def test_four_rollouts():
    # 1, 2, 3 and 6 have mean 3, a sum of squares of 4 + 1 + 0 + 9 = 14, and sd sqrt(14/3).
    sd = math.sqrt(14 / 3) + 1e-6
    advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert advantages.tolist() == pytest.approx([-2 / sd, -1 / sd, 0.0, 3 / sd], abs=1e-14)


def test_eps_is_added_to_the_deviation():
    assert group_advantages(torch.tensor([0.0, 1.0]), eps=1 - math.sqrt(0.5)).tolist() == pytest.approx([-0.5, 0.5])
    with pytest.raises(ValueError, match="eps"):
        group_advantages(torch.tensor([0.0, 1.0]), eps=0.0)


@pytest.mark.parametrize(
    ("reward", "degenerate"),
    [
        ([5.0], True),
        ([0.7, 0.7, 0.7], True),
        ([0.1 + 0.2, 0.3], True),  # The rewards differ only by rounding.
        ([0.0, 1e-6], True),
        ([0.0, 1.1e-6], False),
        ([1e6, 1e6 + 0.9], True),  # The tolerance scales with the mean.
        ([1e6, 1e6 + 1.1], False),
        ([-1e6, -1e6 - 0.9], True),
        ([0.0, 0.001], False),
    ],
)
def test_degenerate_groups_give_exact_zeros(reward, degenerate):
    reward = torch.tensor(reward, dtype=torch.float64)
    advantages = group_advantages(reward)
    assert bool(degenerate_groups(reward)) is degenerate
    assert (advantages == 0).all().item() is degenerate
    assert advantages.shape == reward.shape


def test_groups_along_leading_axes():
    rewards = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    together = group_advantages(rewards)
    for row, reward in zip(together, rewards, strict=True):
        assert torch.equal(row, group_advantages(reward))
    assert degenerate_groups(rewards).tolist() == [False, True, False]


def test_dtypes():
    assert group_advantages(torch.tensor([0, 1])).dtype == torch.float32
    assert group_advantages(torch.tensor([0.0, 1.0], dtype=torch.bfloat16)).dtype == torch.float32
    assert group_advantages(torch.tensor([True])).tolist() == [0.0]


def test_a_non_finite_reward_is_not_hidden():
    assert group_advantages(torch.tensor([0.0, 1.0, float("nan")])).isnan().all()
    assert group_advantages(torch.tensor([0.0, 1.0, float("inf")])).isnan().all()


def test_invalid_shapes():
    for reward in (torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="reward: expected shape"):
            group_advantages(reward)
