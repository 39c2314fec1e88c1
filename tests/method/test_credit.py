"""Test token credit with numbers worked out by hand and the invariants of each method."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rmsd_fast.method.credit import (
    avsd_advantages,
    k1_advantages,
    magnitude_mix,
    magnitude_weights,
    overlap_shares,
    position_weights,
    prune_weights,
    renormalized_gap,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_magnitude_weights_by_hand() -> None:
    # exp(0.1) = 1.105 and exp(-0.1) = 0.905 are within 0.8 to 1.2, exp(1) and exp(-1) are not.
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    gap = torch.tensor([0.1, 0.1, -1.0, -1.0, 5.0], dtype=torch.float64)
    weights, clipped = magnitude_weights(advantage, gap, clip=0.2, mix=0.5)
    assert weights.tolist() == pytest.approx([1.0525854590, 0.9524187090, 0.9, 1.1, 1.0])
    assert clipped.tolist() == [False, False, True, True, False]


def test_magnitude_weights_keep_sign_and_bounds() -> None:
    advantage, gap = _random(500), 3 * _random(500, seed=1)
    advantage[::7] = 0
    for mix in (0.1, 0.5, 1.0):
        weights, clipped = magnitude_weights(advantage, gap, clip=0.2, mix=mix)
        assert torch.equal(torch.sign(advantage * weights), torch.sign(advantage))
        assert float(weights.min()) >= 1 - 0.2 * mix - 1e-12 and float(weights.max()) <= 1 + 0.2 * mix + 1e-12
        assert bool((weights[advantage == 0] == 1).all()) and not bool(clipped[advantage == 0].any())
    for changed in ({"mix": 0.0, "gap": gap}, {"mix": 0.5, "gap": torch.zeros_like(gap)}):
        weights, _ = magnitude_weights(advantage, changed["gap"], clip=0.2, mix=changed["mix"])
        assert torch.equal(weights, torch.ones_like(weights))
    # A token that the teacher considers impossible, or far more probable, has a finite weight.
    extreme = torch.tensor([1e4, -1e4])
    assert magnitude_weights(torch.ones(2), extreme, clip=0.2, mix=0.5)[0].tolist() == pytest.approx([1.1, 0.9])


def test_magnitude_mix_decreases_to_zero() -> None:
    assert [magnitude_mix(step, mix=0.5, steps=600) for step in (0, 300, 600, 900)] == [0.5, 0.25, 0.0, 0.0]
    assert magnitude_mix(10**6, mix=0.5, steps=0) == 0.5


def test_k1_advantages_by_hand() -> None:
    gap = torch.tensor([[0.5, -20.0, 30.0], [1.5, -20.0, 10.0]])
    assert k1_advantages(gap[0], clip=10.0).tolist() == [0.5, -10.0, 10.0]
    assert k1_advantages(gap, clip=10.0).tolist() == [1.0, -10.0, 10.0]
    assert torch.equal(k1_advantages(-gap[0], clip=10.0), -k1_advantages(gap[0], clip=10.0))
    assert torch.equal(k1_advantages(torch.zeros(3), clip=10.0), torch.zeros(3))


def test_k1_is_the_gradient_of_the_reverse_kl() -> None:
    """Enumerate five tokens: the expectation of g * grad log p(y) is -grad KL(p || q)."""
    logits, teacher = _random(5, seed=2).requires_grad_(), torch.log_softmax(_random(5, seed=3), 0)
    logp = torch.log_softmax(logits, 0)
    divergence = (logp.exp() * (logp - teacher)).sum()
    (expected,) = torch.autograd.grad(-divergence, logits, retain_graph=True)
    gain = k1_advantages(teacher - logp.detach(), clip=10.0)
    (found,) = torch.autograd.grad((logp.exp().detach() * gain * logp).sum(), logits)
    assert (found - expected).abs().max() < 1e-15


def test_avsd_advantages_by_hand() -> None:
    # Two views of probability 0.4 and 0.1 of a token of probability 0.1: gaps log 4 and 0.
    teacher, student = torch.tensor([[0.4], [0.1]]).double().log(), torch.tensor([0.1]).double().log()
    mean_gap, spread = math.log(4) / 2, math.log(0.25) - (math.log(0.4) + math.log(0.1)) / 2
    # Both gaps have the same sign, so they agree fully: C = 1.
    expected = mean_gap + mean_gap / (mean_gap + spread) * spread
    assert avsd_advantages(teacher, student, clip=10.0).tolist() == pytest.approx([expected], rel=1e-6)
    # Opposite gaps cancel.
    opposed = torch.tensor([[0.2], [0.05]]).double().log()
    assert avsd_advantages(opposed, student, clip=10.0).abs().max() < 1e-6
    assert avsd_advantages(teacher + 50, student, clip=10.0).tolist() == [10.0]


def test_avsd_advantages_keep_their_invariants() -> None:
    teacher, student = -3 * _random(3, 400).abs(), -3 * _random(400, seed=4).abs()
    mean_gap = (teacher - student).mean(0)
    found = avsd_advantages(teacher, student, clip=1e9)
    assert bool(((found - mean_gap).abs() <= mean_gap.abs() * (1 + 1e-9)).all())
    assert torch.equal(torch.sign(found), torch.sign(mean_gap))
    for order in itertools.permutations(range(3)):
        assert (avsd_advantages(teacher[list(order)], student, clip=1e9) - found).abs().max() < 1e-12
    # A single view, or equal views, give the gap.
    assert torch.equal(avsd_advantages(teacher[:1], student, clip=1e9), teacher[0] - student)
    same = avsd_advantages(teacher[:1].expand(3, -1), student, clip=1e9)
    assert (same - (teacher[0] - student)).abs().max() < 1e-12


def test_position_weights() -> None:
    settings = {"least": 0.25, "start": 0.3, "width": 0.1}
    # Positions 1/8, 3/8, 5/8 and 7/8.
    expected = [0.25 + 0.75 / (1 + math.exp(-(t / 8 - 0.3) / 0.1)) for t in (1, 3, 5, 7)]
    assert position_weights(4, **settings).tolist() == pytest.approx(expected, rel=1e-12)
    weights = position_weights(300, **settings)
    assert bool((weights.diff() > 0).all()) and float(weights.min()) > 0.25 and float(weights.max()) < 1
    assert torch.equal(position_weights(7, least=1.0, start=0.3, width=0.1), torch.ones(7, dtype=torch.float64))


def test_renormalized_gap_by_hand() -> None:
    # The teacher's two most probable tokens are 0 and 1. The first token is one of them, the second is not.
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]] * 2, dtype=torch.float64).log()
    student = torch.tensor([[0.1, 0.4, 0.3, 0.2]] * 2, dtype=torch.float64).log()
    own, among = torch.tensor([1, 3]), torch.tensor([True, False])
    rows = torch.arange(2)
    gap = renormalized_gap(teacher[:, :2], student[:, :2], teacher[rows, own], student[rows, own], among)
    expected = [math.log((0.3 / 0.8) / (0.4 / 0.5)), math.log((0.1 / 0.9) / (0.2 / 0.7))]
    assert gap.tolist() == pytest.approx(expected)


def test_renormalized_gap_over_the_whole_vocabulary_is_that_of_the_sampled_token() -> None:
    teacher, student = (torch.log_softmax(_random(40, 11, seed=seed), -1) for seed in (0, 1))
    own = torch.arange(40) % 11
    q, p = (x.gather(1, own[:, None])[:, 0] for x in (teacher, student))
    for k in (1, 5, 10, 11):
        top = teacher.topk(k, -1)
        among = (top.indices == own[:, None]).any(1)
        gap = renormalized_gap(top.values, student.gather(1, top.indices), q, p, among)
        # Union written out with sets.
        for t in range(40):
            union = sorted({*top.indices[t].tolist(), int(own[t])})
            of_q, of_p = (x[t, union].logsumexp(0) for x in (teacher, student))
            assert float(gap[t]) == pytest.approx(float(q[t] - of_q - p[t] + of_p), abs=1e-12)
        assert torch.allclose(gap, q - p, atol=1e-12) == (k == 11)
    # Equal distributions have no gap.
    assert renormalized_gap(top.values, top.values, q, q, among).abs().max() < 1e-12


def test_overlap_shares_by_hand() -> None:
    student = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]])
    teacher = torch.tensor([[4, 3, 2, 1], [5, 9, 8, 0], [5, 6, 7, 8]])
    assert overlap_shares(student, teacher).tolist() == [1.0, 0.5, 0.0]


def test_prune_weights_by_hand_and_never_rise() -> None:
    overlap = torch.tensor([1.0, 0.6, 0.7, 0.0, 1.0])
    settings = {"threshold": 0.7, "decay": 0.4, "floor": 0.5}
    assert prune_weights(overlap, **settings).tolist() == pytest.approx([1.5, 1.1, 1.1, 0.7, 0.7])
    # After three tokens below the threshold, the lower bound is reached.
    assert prune_weights(torch.zeros(4), **settings).tolist() == pytest.approx([1.1, 0.7, 0.5, 0.5])
    assert torch.equal(prune_weights(torch.ones(9), **settings), torch.full((9,), 1.5))
    random = prune_weights(torch.rand(500, generator=torch.Generator().manual_seed(0)), **settings | {"decay": 0.01})
    assert bool((random[1:] <= random[:-1]).all()) and float(random.min()) >= 0.5 and float(random.max()) <= 1.5
    # A decay of 0 cannot be set; the smallest effect is none before the first miss.
    assert float(prune_weights(torch.tensor([0.7]), **settings)) == 1.5
