"""95% intervals over questions that come in clusters, such as the questions about one video, in bounded memory.

Questions about one video are not independent. Scores get a Wilson interval with an effective number of questions
(`score_interval`), and differences a bootstrap over clusters (`mean_interval`). Both widen if there are few clusters.
With one question per cluster, the former is the ordinary Wilson interval. Neither has an interval for a single cluster,
also if it is a single question, because it shows nothing of the variation between clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
# Draws that are handled at once, at least one sample.
_BLOCK = 2**15
# 0.975 quantile of the normal distribution.
Z975 = 1.959963984540054
# 0.975 quantiles of Student's t distribution with 1 to 30 degrees of freedom.
_T975 = (
    *(12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.0639, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)


def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t distribution, to five digits.

    Args:
        degrees: degrees of freedom, at least 1.
    """
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    # Cornish-Fisher expansion around the normal quantile.
    first, second = (Z975**3 + Z975) / 4, (5 * Z975**5 + 16 * Z975**3 + 3 * Z975) / 96
    return Z975 + first / degrees + second / degrees**2


def score_interval(values: npt.ArrayLike, clusters: Sequence[str] | None = None) -> tuple[float, float] | None:
    """Return the 95% interval of a mean of scores, or None if all values are of one cluster.

    It is Wilson's interval for the effective number of questions n / deff * (t[n-1] / t[C-1])**2, for n questions in C
    clusters. deff is the variance of the mean between clusters divided by the variance that independent questions would
    have, and at least 1. If all values are equal, each cluster counts as one question. For graded scores the interval
    is conservative, because their variance is at most that of a 0/1 score with the same mean.

    Args:
        values: one score per question, [n], in [0, 1].
        clusters: the cluster of each value, [n]; None means that each value is its own cluster.
    Raises:
        ValueError: there are no values, the lists differ in length, or a value is not in [0, 1].
    Source: Korn and Graubard (1998), Survey Methodology 24 (effective number); Wilson (1927) (interval).
    """
    scores = _checked(values)
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"values: expected scores in [0, 1], got {scores.min():g} to {scores.max():g}")
    n, index, count = len(scores), *_cluster_index(clusters, len(scores))
    if count == 1:
        return None
    mean = float(scores.mean())
    effective = float(n)
    if count < n:
        deviations = scores - mean
        independent = float((deviations**2).sum()) * n / (n - 1)
        between = float((np.bincount(index, deviations, count) ** 2).sum()) * count / (count - 1)
        # Rounding leaves deviations of about 1e-16 if all values are equal.
        design = n / count if independent <= 1e-20 else max(1.0, between / independent)
        effective = n / design * (t_quantile(n - 1) / t_quantile(count - 1)) ** 2
    z = Z975
    center = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * (mean * (1 - mean) / effective + z * z / (4 * effective**2)) ** 0.5 / (1 + z * z / effective)
    return max(0.0, center - half), min(1.0, center + half)


def resampled_means(values: npt.ArrayLike, *, clusters: Sequence[str] | None = None, seed: int = 0) -> np.ndarray:
    """Return the column means of samples of the rows, drawn with replacement.

    All columns use the same draws, so the difference of two columns is paired.

    Args:
        values: one row per question, [n, C], finite.
        clusters: the cluster of each row, [n]. Whole clusters are drawn. None means that each row is its own cluster.
        seed: seed of the draws.
    Returns:
        Means, [RESAMPLES, C].
    Raises:
        ValueError: there are no rows, values has another shape, a value is not finite, or the lists differ in length.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: expected shape [n, C] with n > 0, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("values: expected finite numbers, got NaN or infinity; leave these rows out")
    columns = np.ascontiguousarray(values.T)
    sizes = None
    if clusters is not None:
        index, count = _cluster_index(clusters, len(values))
        columns = np.stack([np.bincount(index, column, count) for column in columns])
        sizes = np.bincount(index, minlength=count).astype(np.float64)
    rng, n = np.random.default_rng(seed), columns.shape[1]
    means = np.empty((RESAMPLES, len(columns)))
    # A block of samples stays in the processor's cache, which is three times as fast for 50,000 rows. einsum uses no
    # threads: those of a matrix product wait for each other, and take 30 times as long on a busy machine.
    block = min(RESAMPLES, max(1, _BLOCK // n))
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        places = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        drawn = np.bincount(places.reshape(-1), minlength=size * n).reshape(size, n).astype(np.float64)
        totals = n if sizes is None else np.einsum("sn,n->s", drawn, sizes)[:, None]
        means[start : start + size] = np.einsum("sn,cn->sc", drawn, columns) / totals
    return means


def interval_95(samples: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of resampled statistics, [RESAMPLES]."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(
    values: npt.ArrayLike, clusters: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval of a mean, or None if all values are of one cluster.

    The percentiles are those of Student's t distribution with C - 1 degrees of freedom for C clusters, because plain
    percentiles are too narrow for few clusters.

    Args:
        values: one value per question, [n], finite; usually a paired difference.
        clusters: the cluster of each value, [n]; None means that each value is its own cluster.
        seed: seed of the draws.
    Raises:
        ValueError: as `resampled_means`.
    Source: Hesterberg (2015), The American Statistician 69 (expanded percentiles).
    """
    values = _checked(values)
    count = _cluster_index(clusters, len(values))[1]
    if count == 1:
        return None
    share = 100 * NormalDist().cdf(-((count / (count - 1)) ** 0.5) * t_quantile(count - 1))
    means = resampled_means(values[:, None], clusters=clusters, seed=seed)[:, 0]
    low, high = np.percentile(means, [share, 100 - share])
    return float(low), float(high)


def _checked(values: npt.ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: expected shape [n] with n > 0, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("values: expected finite numbers, got NaN or infinity; leave these rows out")
    return values


def _cluster_index(clusters: Sequence[str] | None, n: int) -> tuple[np.ndarray, int]:
    """Return the index of each value's cluster, in order of first appearance, and the number of clusters."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise ValueError(f"clusters: expected one per value, {n}, got {len(clusters)}")
    numbers: dict[str, int] = {}
    index = np.fromiter((numbers.setdefault(cluster, len(numbers)) for cluster in clusters), np.int64, n)
    return index, len(numbers)
