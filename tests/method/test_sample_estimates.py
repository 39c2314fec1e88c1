"""Test pass@k, best@k and majority@k against their definitions."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from rmsd_fast.stages.sample_estimates import best_at_k, majority_at_k, pass_at_k, sizes_of


def test_sizes_are_powers_of_two_and_n():
    assert [sizes_of(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("scores", [[1, 0, 0, 1, 0, 0], [0.0] * 5, [1.0] * 3, [0.2, 0.9, 0.9, 0.0, 0.55]])
def test_pass_at_k_is_the_mean_of_the_best_over_all_subsets(scores):
    for k in range(1, len(scores) + 1):
        assert pass_at_k(scores, k) == pytest.approx(fmean(map(max, combinations(scores, k))))
    assert pass_at_k(scores, 1) == pytest.approx(fmean(scores)) and pass_at_k(scores, len(scores)) == max(scores)


def test_pass_at_k_by_hand():
    # 2 of 6 are right: 1 - C(4, 2) / C(6, 2) = 1 - 6/15.
    assert pass_at_k([1, 0, 0, 1, 0, 0], 2) == pytest.approx(0.6)
    assert pass_at_k([1.0] * 100, 50) == 1.0
    with pytest.raises(ValueError, match="k: expected 1 to 2, the number of responses, got 3"):
        pass_at_k([1, 0], 3)


def test_majority_by_hand():
    scores, answers = [1.0, 0.0, 0.0, 1.0], ["A", "B", "B", "A"]
    # One response each; two blocks of a tie and a tie; a tie of all.
    assert [majority_at_k(scores, answers, k) for k in (1, 2, 4)] == [0.5, 0.5, 0.5]
    assert majority_at_k([1.0, 0.0, 1.0], ["A", "B", "A"], 3) == 1.0
    # Unreadable responses do not vote, even if they are the most.
    assert majority_at_k([0.0, 0.0, 1.0], [None, None, "A"], 3) == 1.0
    assert majority_at_k([0.0, 0.0], [None, None], 2) == 0.0
    # Blocks are disjoint, and a remainder is left out: (A, A), (B, B).
    assert majority_at_k([1, 1, 0, 0, 1], ["A", "A", "B", "B", "A"], 2) == 0.5


@pytest.mark.parametrize("ranks", [[0.5, -1, 2, 0, 1], [1, 1, 2, 2, 2], [None, 3, None, 0, 0], [None] * 5])
def test_best_at_k_is_the_mean_of_the_preferred_over_all_subsets(ranks):
    scores = [0.2, 0.9, 0.0, 1.0, 0.55]

    def preferred(subset):
        values = [float("-inf") if ranks[i] is None else ranks[i] for i in subset]
        return fmean(scores[i] for i, value in zip(subset, values, strict=True) if value == max(values))

    for k in range(1, 6):
        assert best_at_k(scores, ranks, k) == pytest.approx(fmean(map(preferred, combinations(range(5), k))))
    # Ranked by its own scores, the best is that of pass@k.
    assert best_at_k(scores, scores, 3) == pytest.approx(pass_at_k(scores, 3))


def test_best_at_k_by_hand():
    # The preferred of two is the first in 1 of 3 pairs, or the second in 2 of 3.
    assert best_at_k([1, 0, 0], [1, 2, 0], 2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="k: expected 1 to 2, the number of responses, got 0"):
        best_at_k([1, 0], [0, 1], 0)
