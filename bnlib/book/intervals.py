"""Intervals of what chapters measure, by SciPy: over seeds, or over the examples of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["bootstrap", "t_interval"]


def t_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent measurements, one a seed.

    Parameters
    ----------
    values
        The measurements, (n,), with n at least 2.
    level
        Its confidence.

    Returns
    -------
    tuple of float
        The lower and the upper end; both are the value where all measurements are equal.

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    from scipy import stats

    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"an interval needs two measurements or more in a row; got {found.shape}")
    mean, error = float(found.mean()), float(stats.sem(found))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(level, len(found) - 1, loc=mean, scale=error)
    return float(low), float(high)


def bootstrap(
    samples: Sequence[Any] | ArrayLike,
    statistic: Callable[..., float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    paired: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile bootstrap interval of any statistic.

    Parameters
    ----------
    samples
        One sample, or several of which ``statistic`` takes one argument each, drawn anew apart
        from each other unless ``paired``.
    statistic
        From samples to a number.
    level
        Its confidence.
    resamples
        Draws.
    paired
        Whether the samples belong together entry by entry.
    seed
        Of the draws.

    Returns
    -------
    tuple of float
        The lower and the upper end.
    """
    from scipy import stats

    several = isinstance(samples, (list, tuple)) and np.ndim(samples[0]) > 0
    each: Sequence[Any] = samples if several else [samples]  # type: ignore[assignment]
    data = tuple(np.asarray(sample) for sample in each)
    found = stats.bootstrap(
        data,
        statistic,
        confidence_level=level,
        n_resamples=resamples,
        paired=paired,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
