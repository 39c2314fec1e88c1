"""Test matching probabilities, counter-based draws, and the pairs of the discriminator loss."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from rmsd_fast.method.matching import (
    TOP_TOKENS,
    aligned_response,
    best_response,
    expected_pairs,
    matching_probabilities,
    order_pairs,
    overlap,
    passes_filter,
    sample_matches,
    sampled_pairs,
    top_responses,
    uniform,
)
from rmsd_kernels.reference import pairwise_discriminator_loss


def probabilities(quality, closed=True, tau=0.3, power=1.0):
    kept = [passes_filter(q, tau) for q in quality]
    return matching_probabilities(torch.tensor(quality), closed_ended=closed, kept=kept, power=power).tolist()


def test_closed_ended_is_proportional_to_kept_quality():
    # 0.2 is dropped, and the others have probabilities 1.0 / 1.6 and 0.6 / 1.6.
    assert probabilities([1.0, 0.2, 0.6]) == pytest.approx([0.625, 0.0, 0.375])


def test_open_ended_is_uniform_over_the_kept():
    assert probabilities([1.0, 0.0, 1.0, 1.0], closed=False) == pytest.approx([1 / 3, 0.0, 1 / 3, 1 / 3])


def test_a_power_of_the_quality():
    # 1 / 1.25 and 0.25 / 1.25.
    assert probabilities([1.0, 0.5], power=2.0) == pytest.approx([0.8, 0.2])
    assert probabilities([1.0, 0.5], power=1.0) == pytest.approx([2 / 3, 1 / 3])
    assert probabilities([1.0, 1.0], closed=False, power=4.0) == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="power"):
        probabilities([1.0], power=0.0)


def test_without_a_filter_quality_0_is_matched_only_uniformly():
    quality = torch.tensor([0.0, 0.5])
    assert matching_probabilities(quality, closed_ended=True).tolist() == [0.0, 1.0]
    assert matching_probabilities(quality, closed_ended=False).tolist() == [0.5, 0.5]
    assert matching_probabilities(quality, closed_ended=False, kept=[True, False]).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="kept: expected 2 flags"):
        matching_probabilities(quality, closed_ended=True, kept=[True])


def test_the_filter_keeps_the_threshold_itself_and_never_quality_0():
    assert passes_filter(0.3, 0.3) and not passes_filter(0.299, 0.3)
    assert passes_filter(0.01, 0.0) and not passes_filter(0.0, 0.0)


def test_all_zero_if_nothing_is_kept():
    assert probabilities([0.1, 0.2]) == [0.0, 0.0]
    assert probabilities([0.1, 0.2], closed=False) == [0.0, 0.0]
    assert probabilities([0.0, 0.0], tau=0.0) == [0.0, 0.0]
    assert probabilities([]) == []


def test_dtype_follows_quality():
    for quality_dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        p = matching_probabilities(torch.ones(3, dtype=quality_dtype), closed_ended=True)
        assert p.dtype == expected
        sample_matches(p, 2, seed=0, step=0, question_id="q")


@pytest.mark.parametrize("quality", [[float("nan"), 1.0], [1.5], [-0.1], [[0.5]]])
def test_invalid_quality(quality):
    with pytest.raises(ValueError, match="quality"):
        matching_probabilities(torch.tensor(quality), closed_ended=True)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.0, 0.0], "all zero"),
        ([], "all zero"),
        ([1.5, -0.5], ">= 0"),
        ([float("nan"), 1.0], "finite"),
        ([float("inf"), 1.0], "finite"),
        ([0.5, 0.4], "sum to 1"),
        ([[0.5, 0.5]], "shape"),
    ],
)
def test_invalid_probabilities(p, message):
    with pytest.raises(ValueError, match=message):
        sample_matches(torch.tensor(p), 4, seed=0, step=0, question_id="q")


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="n: expected"):
        sample_matches([1.0], -1, seed=0, step=0, question_id="q")


def test_matches_are_a_function_of_their_counters():
    p = torch.tensor([0.2, 0.0, 0.5, 0.3])
    draw = lambda n=64, **kw: sample_matches(p, n, **{"seed": 1, "step": 2, "question_id": "q7", **kw})  # noqa: E731
    first = draw()
    assert first.dtype == torch.int64 and first.shape == (64,)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, draw())
    torch.set_rng_state(state)
    assert torch.equal(first[:5], draw(5))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 2}, {"step": 3}, {"question_id": "q8"}, {"seed": 12, "step": 0}):
        assert not torch.equal(first, draw(**other))
    assert 1 not in first.tolist()
    assert draw(0).shape == (0,)


def test_matches_are_the_same_in_another_process():
    code = (
        "from rmsd_fast.method.matching import sample_matches;"
        "print(sample_matches([0.25, 0.75], 16, seed=3, step=4, question_id='ü').tolist())"
    )
    # The other process has another hash seed, because the draw must not depend on Python's hash.
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment(PYTHONHASHSEED="5")
    )
    assert result.stdout.strip() == str(sample_matches([0.25, 0.75], 16, seed=3, step=4, question_id="ü").tolist())


def _environment(**changes):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **changes}


def test_draws_at_the_edges_never_select_zero_probability(monkeypatch):
    for draw in (0.0, 0.5, 1 - 2.0**-53):
        monkeypatch.setattr("rmsd_fast.method.matching.uniform", lambda *_, draw=draw, **__: draw)
        for p in ([0.0, 1.0, 0.0], [0.0, 1 + 1e-7, 0.0]):
            assert sample_matches(p, 1, seed=0, step=0, question_id="q").tolist() == [1]
    monkeypatch.setattr("rmsd_fast.method.matching.uniform", lambda *_, **__: 0.5)
    assert sample_matches([0.5, 0.0, 0.5], 1, seed=0, step=0, question_id="q").tolist() == [2]


def test_frequencies_pass_a_chi_square_test():
    p = [0.4, 0.1, 0.0, 0.3, 0.2]
    counts = Counter()
    for step in range(500):
        counts.update(sample_matches(p, 8, seed=0, step=step, question_id="q").tolist())
    assert counts[2] == 0
    statistic = sum((counts[k] - 4000 * p_k) ** 2 / (4000 * p_k) for k, p_k in enumerate(p) if p_k)
    # This is the 99.9% quantile with 3 degrees of freedom.
    assert statistic < 16.27


def test_rollouts_are_matched_independently():
    # Pairs (m(0), m(1)) over questions follow the product distribution, with the 99.9% quantile for 3 degrees of
    # freedom.
    p, counts = [0.3, 0.7], Counter()
    for number in range(2000):
        counts[tuple(sample_matches(p, 2, seed=0, step=0, question_id=str(number)).tolist())] += 1
    expected = {(a, b): 2000 * p[a] * p[b] for a in (0, 1) for b in (0, 1)}
    assert sum((counts[key] - value) ** 2 / value for key, value in expected.items()) < 16.27


def test_uniform_is_within_the_unit_interval_and_separates_purposes():
    values = [uniform("match", 0, 0, "q", index=i) for i in range(2000)]
    assert 0 <= min(values) and max(values) < 1
    assert abs(sum(values) / 2000 - 0.5) < 0.03
    assert uniform("best", 0, 0, "q", index=0) != values[0]
    # Moving digits from one field to the next changes the key.
    assert uniform("match", 1, 11, "q", index=0) != uniform("match", 11, 1, "q", index=0)


def test_best_response():
    every = [True, True, True]
    assert best_response([0.2, 0.9, 0.5], every, seed=0, question_id="q") == 1
    assert best_response([0.2, 0.9, 0.5], [True, False, True], seed=0, question_id="q") == 2
    assert best_response([0.0, 0.0], [False, False], seed=0, question_id="q") is None
    assert best_response([], [], seed=0, question_id="q") is None
    ties = Counter(best_response([1, 0, 1], every, seed=0, question_id=str(i)) for i in range(400))
    assert set(ties) == {0, 2} and 150 < ties[0] < 250
    # Without a filter, responses of quality 0 are candidates if there is nothing better.
    assert {best_response([0, 0], [True, True], seed=0, question_id=str(i)) for i in range(50)} == {0, 1}


def test_order_pairs_by_hand():
    pairs = order_pairs([torch.tensor([0.25, 1.0, 0.25]), torch.tensor([0.5]), torch.tensor([0.0, 0.5])])
    found = list(zip(pairs.student_index.tolist(), pairs.teacher_index.tolist(), pairs.quality.tolist(), strict=True))
    assert found == [(0, 1, 0.75), (2, 1, 0.75), (4, 5, 0.5)]
    # 3 responses over 3 pairs, 2 responses over 1 pair.
    assert pairs.pair_weight.tolist() == [1.0, 1.0, 2.0]
    assert len(order_pairs([torch.tensor([1.0, 1.0])]).quality) == 0 and len(order_pairs([]).quality) == 0


def ragged_groups():
    """Return three groups: 2 rollouts and 3 responses (one dropped), an empty pool, and 3 rollouts and 2 responses."""
    quality = [torch.tensor([1.0, 0.2, 0.6]), torch.tensor([0.1]), torch.tensor([0.5, 0.5])]
    p = [matching_probabilities(q, closed_ended=True, kept=(q >= 0.3).tolist()) for q in quality]
    return [2, 2, 3], p, quality


def test_expected_pairs_by_hand():
    pairs = expected_pairs(*ragged_groups())
    assert pairs.student_index.tolist() == [0, 0, 1, 1, 4, 4, 5, 5, 6, 6]
    assert pairs.teacher_index.tolist() == [0, 2, 0, 2, 4, 5, 4, 5, 4, 5]
    assert pairs.quality.tolist() == pytest.approx([1.0, 0.6, 1.0, 0.6] + [0.5] * 6)
    assert pairs.pair_weight.tolist() == pytest.approx([0.625, 0.375] * 2 + [0.5] * 6)
    assert pairs.normalizer == 5
    assert pairs.pair_weight.sum().item() == pytest.approx(5)


def test_sampled_pairs_by_hand():
    num_rollouts, _, quality = ragged_groups()
    pairs = sampled_pairs(num_rollouts, [torch.tensor([2, 0]), None, torch.tensor([1, 1, 0])], quality)
    assert pairs.student_index.tolist() == [0, 1, 4, 5, 6]
    assert pairs.teacher_index.tolist() == [2, 0, 5, 5, 4]
    assert pairs.quality.tolist() == pytest.approx([0.6, 1.0, 0.5, 0.5, 0.5])
    assert pairs.pair_weight.tolist() == [1.0] * 5
    assert pairs.normalizer == 5


def pair_loss(student, teacher, pairs):
    return pairwise_discriminator_loss(
        student,
        teacher,
        pairs.student_index,
        pairs.teacher_index,
        pairs.quality,
        pair_weight=pairs.pair_weight,
        normalizer=pairs.normalizer,
    ).loss.item()


def test_expected_equals_the_exact_mean_of_sampled():
    """The mean is over every outcome of the matching, weighted by its probability."""
    num_rollouts, p, quality = ragged_groups()
    student, teacher = torch.randn(7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mean, mass = 0.0, 0.0
    outcomes = [range(3)] * 2 + [range(2)] * 3
    for m in itertools.product(*outcomes):
        chance = (p[0][list(m[:2])].prod() * p[2][list(m[2:])].prod()).item()
        if chance:
            pairs = sampled_pairs(num_rollouts, [torch.tensor(m[:2]), None, torch.tensor(m[2:])], quality)
            mean, mass = mean + chance * pair_loss(student, teacher, pairs), mass + chance
    assert mass == pytest.approx(1, abs=1e-6)
    assert pair_loss(student, teacher, expected_pairs(num_rollouts, p, quality)) == pytest.approx(mean, abs=1e-6)


def test_expected_equals_the_mean_of_sampled_over_many_seeds():
    num_rollouts, p, quality = ragged_groups()
    student, teacher = torch.linspace(-2, 2, 7), torch.linspace(1, -1, 6)
    losses = []
    for seed in range(1500):
        draw = [
            sample_matches(p_g, n, seed=seed, step=0, question_id=str(g)) if p_g.sum() > 0 else None
            for g, (n, p_g) in enumerate(zip(num_rollouts, p, strict=True))
        ]
        losses.append(pair_loss(student, teacher, sampled_pairs(num_rollouts, draw, quality)))
    losses = torch.tensor(losses, dtype=torch.float64)
    expected = pair_loss(student, teacher, expected_pairs(num_rollouts, p, quality))
    assert losses.std() > 1e-3  # The losses differ, so the average is not trivial.
    assert abs(losses.mean().item() - expected) < 4 * losses.std().item() / len(losses) ** 0.5


def test_a_batch_of_empty_pools_gives_no_pairs_and_a_zero_loss():
    empty = [torch.zeros(2)]
    for pairs in (expected_pairs([3], empty, empty), sampled_pairs([3], [None], empty), expected_pairs([], [], [])):
        assert pairs.normalizer == 0 and pairs.student_index.shape == (0,)
        assert pairs.student_index.dtype == torch.int64
        assert pair_loss(torch.ones(3), torch.ones(2), pairs) == 0.0


def test_invalid_groups():
    q = [torch.ones(2)]
    with pytest.raises(ValueError, match="one entry per group"):
        expected_pairs([1, 1], q, q)
    with pytest.raises(ValueError, match="same shape"):
        expected_pairs([1], [torch.ones(3)], q)
    with pytest.raises(ValueError, match="one match per rollout"):
        sampled_pairs([2], [torch.tensor([0])], q)
    with pytest.raises(ValueError, match="0..1"):
        sampled_pairs([1], [torch.tensor([2])], q)
    with pytest.raises(ValueError, match="num_rollouts"):
        expected_pairs([-1], q, q)


def test_overlap_counts_the_tokens_among_the_16_most_probable():
    assert TOP_TOKENS == 16
    assert overlap(torch.tensor([0, 15, 16, 500])) == 0.5
    # A student that is certain of each token of a response has an overlap of 1 with it.
    assert overlap(torch.zeros(7, dtype=torch.int64)) == 1
    assert overlap(torch.tensor([16])) == 0


def test_the_aligned_response_is_the_nearest_of_the_best():
    assert top_responses([0.5, 1.0, 1.0, 1.0], [True, True, False, True]) == [1, 3]
    assert top_responses([], []) == []
    assert aligned_response([1, 3], [0.2, 0.7], seed=0, question_id="q") == 3
    assert aligned_response([1, 3], [0.7, 0.2], seed=5, question_id="q") == 1
    assert aligned_response([], [], seed=0, question_id="q") is None
    # Ties are those of the best response.
    ties = [aligned_response([1, 3, 4], [0.5, 0.2, 0.5], seed=0, question_id=str(i)) for i in range(400)]
    assert 150 < ties.count(1) < 250 and ties.count(3) == 0
    same = [aligned_response([0, 2], [0.5, 0.5], seed=0, question_id=str(i)) for i in range(50)]
    assert same == [best_response([1, 0, 1], [True] * 3, seed=0, question_id=str(i)) for i in range(50)]
