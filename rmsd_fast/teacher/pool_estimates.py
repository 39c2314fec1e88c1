"""Estimates from the answers of a pool: best of K, kept shares, spread, correlations. Each has a worked test.

All intervals are 95% bootstrap intervals over questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsd_fast.bootstrap import interval_95, resampled_means

# Numbers for each K end here.
MOST_K = 64


def best_of(qualities: list[np.ndarray], most: int) -> np.ndarray:
    """Return unbiased estimates of the expected best quality of K answers, for K = 1 to `most`.

    The estimate is the mean, over all subsets of K of the n answers to a question, of the best quality in the subset.
    With ascending qualities q_(1), …, q_(n), it is sum of q_(i) · C(i - 1, K - 1) / C(n, K).

    Args:
        qualities: qualities of the answers to each question, at least `most` each.
        most: largest K.
    Returns:
        Estimates, float64 [questions, most].
    Raises:
        ValueError: a question has fewer than `most` answers.
    """
    weights: dict[int, np.ndarray] = {}
    rows = np.empty((len(qualities), most))
    for index, quality in enumerate(qualities):
        n = len(quality)
        if n < most:
            raise ValueError(f"qualities: expected at least {most} answers per question, got {n}; lower `most`")
        if n not in weights:
            weights[n] = np.array(
                [[math.comb(i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, most + 1)]
            )
        rows[index] = weights[n] @ np.sort(quality)
    return rows


def kept_questions(kept: np.ndarray, answers: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that a random choice of K answers to a question has a kept one.

    With m kept among n answers, it is 1 - C(n - m, K) / C(n, K). With n < K, all n answers are chosen.

    Args:
        kept: number of kept answers to each question, [Q].
        answers: number of its answers, [Q].
        k: K.
    """
    pairs, inverse = np.unique(np.stack([kept, answers], axis=1).astype(int), axis=0, return_inverse=True)
    values = [1 - math.comb(n - m, min(k, n)) / math.comb(n, min(k, n)) for m, n in pairs.tolist()]
    return np.array(values)[inverse.ravel()]


def common_count(counts: np.ndarray) -> int:
    """Return the largest number of answers that at least half of the questions have."""
    return int(np.sort(counts)[len(counts) // 2])


def estimate(values: np.ndarray) -> dict:
    """Return the mean over questions with its interval, {"mean", "low", "high", "n"}. One question has no interval."""
    return estimates({"": values})[""]


def estimates(columns: Mapping[Any, np.ndarray]) -> dict[Any, dict]:
    """Return the `estimate` of each column over the same questions. They share their draws, which takes less time.

    Args:
        columns: values of all questions by name, [n] each.
    """
    values = np.stack(list(columns.values()), axis=1)
    bounds = [(None, None)] * len(columns)
    if len(values) > 1:
        bounds = [interval_95(samples) for samples in resampled_means(values).T]
    return {
        name: {"mean": mean, "low": low, "high": high, "n": len(values)}
        for name, mean, (low, high) in zip(columns, values.mean(0).tolist(), bounds, strict=True)
    }


def ratio(parts: np.ndarray, wholes: np.ndarray) -> dict | None:
    """Return the ratio of two sums over questions with its interval, {"value", "low", "high"}; None if it has none.

    Args:
        parts, wholes: values of each question, [n], such as the numbers of its kept answers and of all its answers.
    """
    if wholes.sum() <= 1e-9:
        return None
    low = high = None
    if len(wholes) > 1:
        drawn = resampled_means(np.stack([parts, wholes], axis=1))
        # The second sum of a sample of few questions may be 0.
        usable = drawn[:, 1] > 1e-12
        if usable.mean() > 0.95:
            low, high = interval_95(drawn[usable, 0] / drawn[usable, 1])
    return {"value": float(parts.sum() / wholes.sum()), "low": low, "high": high}


def spread(qualities: list[np.ndarray]) -> dict | None:
    """Split the variance of the quality into a part within questions and a part between them.

    The variance within is the mean of the unbiased variances s² of the answers to a question. The variance between is
    the unbiased variance of the questions' means, minus the mean of s² / n, which is the part of it that comes from the
    choice of the answers; it is at least 0.

    Args:
        qualities: qualities of the answers to each question.
    Returns:
        {"questions", "within", "between", "between_share"} over the questions with at least two answers, where
        `between_share` is the share of the second in the sum of both (None if both are 0); None if there are fewer than
        two such questions.
    """
    several = [quality for quality in qualities if len(quality) > 1]
    if len(several) < 2:
        return None
    inside = np.array([quality.var(ddof=1) for quality in several])
    noise = float(np.mean(inside / [len(quality) for quality in several]))
    means = np.array([quality.mean() for quality in several])
    within, between = float(inside.mean()), max(0.0, float(means.var(ddof=1)) - noise)
    total = within + between
    # Differences of rounding errors are not a spread.
    share = between / total if total > 1e-12 else None
    return {"questions": len(several), "within": within, "between": between, "between_share": share}


def correlation(x: np.ndarray, y: np.ndarray, owner: np.ndarray, *, within: bool) -> dict | None:
    """Return the correlation of two values over answers, with an interval over questions.

    Args:
        x, y: values of each answer, [A].
        owner: index of each answer's question, [A], ascending.
        within: whether to subtract the means of the question's answers first, so that only differences between the
            answers to one question count.
    Returns:
        {"value", "low", "high", "questions", "answers"}; None if one of the values does not vary.
    """
    _, index, counts = np.unique(owner, return_inverse=True, return_counts=True)
    if not len(counts):
        return None
    for_sums = [x.astype(np.float64), y.astype(np.float64)]
    if within:
        for_sums = [v - (np.bincount(index, v) / counts)[index] for v in for_sums]
    else:
        # Subtracting the mean of all answers does not change the result, and keeps the sums below accurate.
        for_sums = [v - v.mean() for v in for_sums]
    x, y = for_sums
    products = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(index, product) for product in products], axis=1)
    value = _correlation(sums.mean(0)[None])[0]
    if math.isnan(value):
        return None
    low = high = None
    if len(counts) > 1:
        drawn = _correlation(resampled_means(sums))
        # A sample of few questions may have no variation.
        if np.isfinite(drawn).mean() > 0.95:
            low, high = interval_95(drawn[np.isfinite(drawn)])
    return {"value": float(value), "low": low, "high": high, "questions": len(counts), "answers": len(x)}


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Return correlations from means of (1, x, y, x², y², xy), [n, 6]; NaN if x or y does not vary."""
    one, x, y, xx, yy, xy = sums.T
    variance_x, variance_y = xx / one - (x / one) ** 2, yy / one - (y / one) ** 2
    product = variance_x * variance_y
    varies = (variance_x > 1e-12) & (variance_y > 1e-12)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, (xy / one - x * y / one**2) / np.sqrt(np.where(varies, product, 1.0)), np.nan)
