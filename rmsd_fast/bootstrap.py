"""Bootstrap intervals over questions, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000


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
    means = np.empty((RESAMPLES, values.shape[1]))
    columns = np.ascontiguousarray(values.T)
    # One sample at a time stays in the processor's cache, which is three times as fast for 50,000 rows. einsum uses no
    # threads: those of a matrix product wait for each other, and take 30 times as long on a busy machine.
    for sample in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        means[sample] = np.einsum("n,cn->c", drawn, columns) / n
    return means


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
