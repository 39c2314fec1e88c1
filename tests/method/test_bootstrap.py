"""Test intervals over questions in clusters: by hand, against definitions, and by their coverage."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from rmsd_fast.bootstrap import RESAMPLES, mean_interval, resampled_means, score_interval, t_quantile


def test_one_question_per_video_gives_wilsons_interval():
    scores, videos = [1.0] * 8 + [0.0] * 2, [f"{i}.mp4" for i in range(10)]
    # The Wilson score interval of 8 in 10 at 95% is 0.490 to 0.943.
    assert score_interval(scores, videos) == score_interval(scores) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_equal_answers_about_a_video_count_as_one():
    # Each of 10 videos has 4 questions with the same score, so the variance of the mean is that of 10 questions:
    # between / independent = (10/9 * sum (4d)^2) / (40/39 * sum 4 d^2), which is 4 * (10/9) / (40/39) = 4.3333.
    scores, videos = np.repeat([1.0] * 8 + [0.0] * 2, 4), np.repeat([f"{i}.mp4" for i in range(10)], 4)
    effective = 40 / (4 * (10 / 9) / (40 / 39)) * (t_quantile(39) / t_quantile(9)) ** 2
    assert effective == pytest.approx(7.38, abs=0.01)
    z, mean = 1.959964, 0.8
    center = (mean + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * (mean * 0.2 / effective + z**2 / (4 * effective**2)) ** 0.5 / (1 + z**2 / effective)
    assert score_interval(scores, list(videos)) == pytest.approx((center - half, center + half), abs=1e-6)


def test_edges_of_clustered_intervals():
    # All right: each video counts as one question, here 5 of them instead of 20.
    low, high = score_interval([1.0] * 20, [str(i // 4) for i in range(20)])
    assert high == 1.0 and low == pytest.approx(1 / (1 + 1.959964**2 / (5 * (t_quantile(19) / t_quantile(4)) ** 2)))
    # Videos that vary less than chance do not make the interval narrower than that of independent questions.
    assert score_interval([0.0, 1.0] * 10, [str(i // 2) for i in range(20)])[0] < score_interval([0.0, 1.0] * 10)[0]
    # One video says nothing about others.
    for interval in (score_interval, mean_interval):
        assert interval([0.0, 1.0], ["a", "a"]) is None
        # A single question is a single cluster, named or not.
        assert interval([1.0], ["a"]) is None and interval([1.0]) is None
        assert interval([0.0, 1.0], ["a", "b"]) == interval([0.0, 1.0]) is not None
    assert mean_interval([0.0, 0.0, 0.0]) == (0.0, 0.0)


def test_the_bootstrap_draws_clusters_with_replacement():
    rng = np.random.default_rng(3)
    values, clusters = rng.random(300), [str(i) for i in rng.integers(0, 40, 300)]
    names = list(dict.fromkeys(clusters))
    sums = np.array([sum(v for v, c in zip(values, clusters, strict=True) if c == name) for name in names])
    sizes = np.array([clusters.count(name) for name in names])
    # All draws at once, as a definition, with the percentiles of a t distribution.
    draws = np.random.default_rng(5).integers(0, len(names), (RESAMPLES, len(names)))
    share = 100 * NormalDist().cdf(-((len(names) / (len(names) - 1)) ** 0.5) * t_quantile(len(names) - 1))
    expected = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [share, 100 - share])
    assert 1.7 < share < 2.5 and mean_interval(values, clusters, seed=5) == pytest.approx(expected)
    # Without clusters, the rows themselves are drawn.
    draws = np.random.default_rng(5).integers(0, 300, (RESAMPLES, 300))
    assert resampled_means(values[:, None], seed=5)[:, 0] == pytest.approx(values[draws].mean(1))


def test_intervals_refuse_values_that_are_no_scores():
    with pytest.raises(ValueError, match=r"expected scores in \[0, 1\], got -0.5 to 1"):
        score_interval([-0.5, 1.0])
    with pytest.raises(ValueError, match="clusters: expected one per value, 2, got 1"):
        mean_interval([0.0, 1.0], ["a"])


@pytest.mark.parametrize("videos", [12, 60])
def test_intervals_cover_the_true_value(videos):
    """Of 95% intervals over repeated samples of videos, about 95% hold the true mean; naive ones far fewer."""
    rng, repeats, truth = np.random.default_rng(videos), 300, 0.6
    hits = {"scores": 0, "naive": 0, "differences": 0}
    for _ in range(repeats):
        sizes = rng.integers(1, 10, videos)
        owner = np.repeat(np.arange(videos), sizes)
        names = [str(i) for i in owner]
        # Videos differ in difficulty: the correlation of two answers about a video is 1 / (1 + 1.5) = 0.4.
        right = (rng.random(len(owner)) < rng.beta(1.5 * truth, 1.5 * (1 - truth), videos)[owner]).astype(float)
        for kind, bounds in (("scores", score_interval(right, names)), ("naive", score_interval(right))):
            hits[kind] += bounds[0] <= truth <= bounds[1]
    # The bootstrap takes longer, so it has fewer repeats.
    for _ in range(100):
        owner = np.repeat(np.arange(videos), rng.integers(1, 6, videos))
        changes = rng.normal(0, 0.3, videos)[owner] + rng.choice([-0.5, 0.0, 0.5], len(owner))
        low, high = mean_interval(changes, [str(i) for i in owner])
        hits["differences"] += low <= 0 <= high
    assert 0.92 <= hits["scores"] / repeats <= 0.98
    assert hits["naive"] / repeats < 0.85
    # Three standard errors of 100 repeats are 0.065.
    assert 0.885 <= hits["differences"] / 100
