"""Test the estimates of the pool report against numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rmsd_fast.bootstrap import mean_interval, resampled_means
from rmsd_fast.teacher.pool_estimates import (
    best_of,
    common_count,
    correlation,
    estimate,
    estimates,
    kept_questions,
    ratio,
    spread,
)


def test_best_of_k_by_hand():
    # The pairs of 0, 0.5 and 1 have the best qualities 0.5, 1 and 1; of the only triple it is 1.
    assert best_of([np.array([1.0, 0.0, 0.5])], 3)[0] == pytest.approx([0.5, 2.5 / 3, 1.0])
    # A question may have more answers than the largest K. Of the six pairs of 0, 0, 0 and 1, three have the 1.
    assert best_of([np.array([0.0, 1.0, 0.0, 0.0])], 2)[0] == pytest.approx([0.25, 0.5])


def test_best_of_k_is_the_mean_over_all_subsets():
    qualities = np.random.default_rng(0).random(7)
    subsets = [np.mean([max(chosen) for chosen in itertools.combinations(qualities, k)]) for k in range(1, 8)]
    assert best_of([qualities], 7)[0] == pytest.approx(subsets)


def test_best_of_k_refuses_too_few_answers():
    with pytest.raises(ValueError, match=r"expected at least 3 answers per question, got 2; lower `most`"):
        best_of([np.ones(3), np.ones(2)], 3)


def test_questions_with_a_kept_answer_by_hand():
    # One kept among four: two of four answers contain it in half of the cases. None kept: never. All kept: always.
    assert kept_questions(np.array([1.0, 0.0, 4.0, 1.0]), np.array([4, 4, 4, 1]), 2) == pytest.approx([0.5, 0, 1, 1])
    # Three of two answers are both of them.
    assert kept_questions(np.array([1.0]), np.array([2]), 3) == pytest.approx([1.0])


def test_the_common_number_of_answers():
    assert common_count(np.array([4, 8, 4, 8])) == 8
    assert common_count(np.array([4, 4, 8])) == 4
    assert common_count(np.array([3])) == 3


def test_the_spread_by_hand():
    # Unbiased variances: 0.5 and 0 within, mean 0.25. The means 0.5 and 1 have the variance 0.125, of which the mean of
    # 0.5 / 2 and 0 / 2, 0.125, is noise.
    parts = spread([np.array([0.0, 1.0]), np.array([1.0, 1.0])])
    assert parts == {"questions": 2, "within": 0.25, "between": 0.0, "between_share": 0.0}
    # The questions differ and their answers do not.
    parts = spread([np.array([0.2, 0.2]), np.array([0.8, 0.8]), np.array([0.5])])
    assert parts["questions"] == 2 and parts["between_share"] == 1.0
    assert (parts["within"], parts["between"]) == (0.0, pytest.approx(0.18))
    assert spread([np.array([0.5]), np.array([1.0])]) is None
    assert spread([np.array([1.0, 1.0]), np.array([1.0, 1.0])])["between_share"] is None


def test_the_spread_recovers_known_variances():
    rng = np.random.default_rng(0)
    qualities = [rng.normal(level, 0.3, 4) for level in rng.normal(0, 0.2, 20_000)]
    parts = spread(qualities)
    assert parts["within"] == pytest.approx(0.09, rel=0.02)
    assert parts["between"] == pytest.approx(0.04, rel=0.04)


def test_correlations_by_hand():
    x, y, owner = np.array([0.0, 1.0, 5.0, 6.0]), np.array([1.0, 0.0, 6.0, 5.0]), np.array([0, 0, 1, 1])
    # Within both questions, y falls by 1 where x rises by 1.
    assert correlation(x, y, owner, within=True)["value"] == pytest.approx(-1)
    # Deviations of x: -3, -2, 2, 3; of y: -2, -3, 3, 2. The products add up to 24, the squares to 26.
    across = correlation(x, y, owner, within=False)
    assert across["value"] == pytest.approx(24 / 26) and (across["questions"], across["answers"]) == (2, 4)
    assert correlation(np.ones(4), y, owner, within=False) is None
    assert correlation(np.array([]), np.array([]), np.array([], dtype=int), within=True) is None


def test_correlations_agree_with_numpy():
    rng = np.random.default_rng(1)
    x, owner = rng.normal(1000, 1, 400), np.repeat(np.arange(100), 4)
    y = 0.5 * x + rng.normal(0, 1, 400)
    found = correlation(x, y, owner, within=False)
    assert found["value"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["low"] < found["value"] < found["high"] and found["high"] - found["low"] < 0.25


def test_estimates_share_their_draws():
    values = np.random.default_rng(2).random(500)
    both = estimates({"a": values, "b": values + 1, "a - a": values - values})
    assert both["b"]["low"] == pytest.approx(both["a"]["low"] + 1)
    assert both["a"] == pytest.approx(estimate(values))
    assert both["a - a"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 500}
    assert estimate(np.array([0.25])) == {"mean": 0.25, "low": None, "high": None, "n": 1}


def test_ratios_by_hand():
    # Of all samples of two questions, a quarter each has the ratio 1/2 twice or 3/4 twice; the others have 4/6.
    assert ratio(np.array([1.0, 3.0]), np.array([2.0, 4.0])) == {"value": 4 / 6, "low": 0.5, "high": 0.75}
    assert ratio(np.array([1.0]), np.array([2.0])) == {"value": 0.5, "low": None, "high": None}
    assert ratio(np.zeros(3), np.zeros(3)) is None


def test_the_bootstrap_refuses_values_without_a_mean():
    with pytest.raises(ValueError, match="expected finite numbers, got NaN"):
        mean_interval([0.5, float("nan")])
    with pytest.raises(ValueError, match=r"expected shape \[n, C\] with n > 0, got \[0, 1\]"):
        resampled_means(np.zeros((0, 1)))
