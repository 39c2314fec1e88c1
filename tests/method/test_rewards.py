"""Test the composite reward and its advantages against hand-computed numbers."""

import math

import pytest
import torch

from rmsd_fast.method.rewards import RewardWeights, composite_advantages, composite_reward

WEIGHTS = RewardWeights()
D = torch.tensor([2.0, -1.0], dtype=torch.float64)
OUTER = torch.tensor([1, 0])
TASK = torch.tensor([True, True])
CONTENT = torch.tensor([0.5, 1.0], dtype=torch.float64)


def test_stated_weights():
    assert (WEIGHTS.alpha, WEIGHTS.beta, WEIGHTS.eta, WEIGHTS.delta) == (0.4, 0.1, 0.1, 0.4)


def test_the_plain_weighted_sum():
    # The rewards are 0.8 + 0.1 + 0.1 + 0.2 and -0.4 + 0 + 0.1 + 0.4.
    reward = composite_reward(D, OUTER, TASK, CONTENT, weights=WEIGHTS)
    assert reward.tolist() == pytest.approx([1.2, 0.1])
    assert reward.dtype == torch.float64
    mapping = {"delta": 0.4, "alpha": 0.4, "beta": 0.1, "eta": 0.1}
    assert torch.equal(reward, composite_reward(D, OUTER, TASK, CONTENT, weights=mapping))


def test_gn_then_sum():
    # Each component of two rollouts becomes ±u with u = |a-b|/2 / (|a-b|/sqrt(2) + 1e-6), and the constant component
    # becomes 0.
    unit = lambda gap: gap / 2 / (gap / math.sqrt(2) + 1e-6)  # noqa: E731
    expected = 0.4 * unit(3) + 0.1 * unit(1) - 0.4 * unit(0.5)
    advantages = composite_advantages(D, OUTER, TASK, CONTENT, weights=WEIGHTS)
    assert advantages.tolist() == pytest.approx([expected, -expected], abs=1e-12)


def test_sum_then_gn():
    unit = 0.55 / (1.1 / math.sqrt(2) + 1e-6)
    advantages = composite_advantages(D, OUTER, TASK, CONTENT, weights=WEIGHTS, normalization="sum_then_gn")
    assert advantages.tolist() == pytest.approx([unit, -unit], abs=1e-12)


def test_kl_in_reward():
    # The rewards are 1.2 - 0.5 * 2 and 0.1 - 0.5 * -1.
    penalty = {"weights": WEIGHTS, "log_ratio": torch.tensor([2.0, -1.0]), "kl_in_reward": 0.5}
    components = (D, OUTER, TASK, CONTENT)
    assert composite_reward(*components, **penalty).tolist() == pytest.approx([0.2, 0.6])
    unit = lambda gap: gap / 2 / (gap / math.sqrt(2) + 1e-6)  # noqa: E731
    literal = composite_advantages(*components, **penalty, normalization="sum_then_gn")
    assert literal.tolist() == pytest.approx([-unit(0.4), unit(0.4)])
    apart = composite_advantages(*components, **penalty)
    expected = 0.4 * unit(3) + 0.1 * unit(1) - 0.4 * unit(0.5) - 0.5 * unit(3)
    assert apart.tolist() == pytest.approx([expected, -expected], abs=1e-6)


def test_an_offset_of_the_spread_gives_an_undecided_discriminator_little_weight():
    # Two scores with the gap g become ±(g/2) / (g/sqrt(2) + 0.5).
    rest = (torch.ones(2), torch.ones(2), torch.ones(2))
    for gap in (0.01, 3.0):
        d = torch.tensor([gap, 0.0], dtype=torch.float64)
        advantages = composite_advantages(d, *rest, weights=WEIGHTS, score_sd_offset=0.5)
        expected = 0.4 * (gap / 2) / (gap / math.sqrt(2) + 0.5 + 1e-6)
        assert advantages.tolist() == pytest.approx([expected, -expected])
    # The other components are not affected.
    zeros, content = torch.zeros(2), torch.tensor([0.0, 1.0])
    plain = composite_advantages(zeros, *rest[:2], content, weights=WEIGHTS)
    assert torch.equal(plain, composite_advantages(zeros, *rest[:2], content, weights=WEIGHTS, score_sd_offset=0.5))


def test_gn_then_sum_ignores_the_scale_and_level_of_d():
    d, content = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    rest = (torch.ones(8), torch.ones(8), content)
    base = composite_advantages(d, *rest, weights=WEIGHTS)
    moved = composite_advantages(1000 * d + 77, *rest, weights=WEIGHTS)
    assert torch.allclose(base, moved, atol=1e-5)
    literal = composite_advantages(d, *rest, weights=WEIGHTS, normalization="sum_then_gn")
    literal_moved = composite_advantages(1000 * d + 77, *rest, weights=WEIGHTS, normalization="sum_then_gn")
    assert not torch.allclose(literal, literal_moved, atol=1e-2)


@pytest.mark.parametrize("normalization", ["gn_then_sum", "sum_then_gn"])
def test_a_group_without_signal_has_zero_advantages(normalization):
    same = torch.full((4,), 0.3)
    advantages = composite_advantages(same, same, same, same, weights=WEIGHTS, normalization=normalization)
    assert advantages.tolist() == [0.0] * 4
    one = torch.tensor([1.7])
    assert composite_advantages(one, one, one, one, weights=WEIGHTS, normalization=normalization).tolist() == [0.0]


def test_an_empty_pool_leaves_content_and_format():
    zeros, content = torch.zeros(2), torch.tensor([0.0, 1.0])
    advantages = composite_advantages(zeros, zeros, zeros, content, weights=WEIGHTS)
    unit = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert advantages.tolist() == pytest.approx([-0.4 * unit, 0.4 * unit], abs=1e-7)


def test_a_non_finite_score_is_not_hidden_unless_its_weight_is_zero():
    bad = torch.tensor([float("nan"), 1.0])
    ones, content = torch.ones(2), torch.tensor([0.0, 1.0])
    assert composite_advantages(bad, ones, ones, content, weights=WEIGHTS).isnan().all()
    without = RewardWeights(alpha=0.0)
    assert composite_advantages(bad, ones, ones, content, weights=without).isfinite().all()
    nothing = RewardWeights(0.0, 0.0, 0.0, 0.0)
    assert composite_reward(ones, ones, ones, ones, weights=nothing).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "weights",
    [
        {"alpha": 0.4},
        {"alpha": 1, "beta": 1, "eta": 1, "delta": 1, "gamma": 1},
        {"alpha": -1, "beta": 1, "eta": 1, "delta": 1},
        {"alpha": float("nan"), "beta": 1, "eta": 1, "delta": 1},
    ],
)
def test_invalid_weights(weights):
    with pytest.raises(ValueError, match=r"weight|keys"):
        composite_reward(D, OUTER, TASK, CONTENT, weights=weights)


def test_damaged_arguments():
    with pytest.raises(ValueError, match="task: expected the shape"):
        composite_reward(D, OUTER, torch.ones(3), CONTENT, weights=WEIGHTS)
    with pytest.raises(ValueError, match="normalization: expected 'gn_then_sum'"):
        composite_advantages(D, OUTER, TASK, CONTENT, weights=WEIGHTS, normalization="none")
