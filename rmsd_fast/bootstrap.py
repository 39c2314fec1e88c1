"""Bootstrap intervals over questions, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
# Number of draws that are in memory at the same time.
_DRAWS = 2_000_000


def resampled_means(values: npt.ArrayLike, *, seed: int = 0) -> np.ndarray:
    """Return the column means of samples of the rows, drawn with replacement.

    All columns use the same draws, so the difference of two columns is paired.

    Args:
        values: one row per question, [n, C], finite.
        seed: seed of the draws.
    Returns:
        Means, [RESAMPLES, C].
    Raises:
        ValueError: there are no rows, values has another shape, or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: expected shape [n, C] with n > 0, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("values: expected finite numbers, got NaN or infinity; leave these rows out")
    rng, n = np.random.default_rng(seed), len(values)
    size = max(1, _DRAWS // n)
    means = []
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        draws = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        drawn = np.bincount(draws.ravel(), minlength=count * n).reshape(count, n)
        means.append(drawn.astype(np.float64) @ values / n)
    return np.concatenate(means)


def interval_95(samples: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of resampled statistics, [RESAMPLES]."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the mean over questions.

    Args:
        values: one value per question, [n], finite.
        seed: seed of the draws.
    """
    return interval_95(resampled_means(np.asarray(values, dtype=np.float64)[:, None], seed=seed)[:, 0])
