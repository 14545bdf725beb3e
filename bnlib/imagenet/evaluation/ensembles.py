"""Means of several networks' probabilities, and intervals for the difference of two predictors.

Every probability tensor is (n, classes): a row an image, a column a class, each row summing to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SMALLEST", "Interval", "arithmetic_mean", "geometric_mean", "paired_bootstrap"]

#: The smallest recorded probability whose logarithm is taken, as one that was rounded to zero would
#: have an infinite log loss.
SMALLEST = 1e-12
_DRAWS = 4000
_AT_ONCE = 4_000_000  # random indices that are drawn at once


def arithmetic_mean(members: Sequence[Tensor]) -> Tensor:
    """The mean of the networks' probabilities: the paper's ensemble (section 4.2.3)."""
    return torch.stack(list(members)).mean(0)


def geometric_mean(members: Sequence[Tensor]) -> Tensor:
    """The product of the networks' probabilities to the power 1/M, made to sum to one.

    .. math:: p_k = \\frac{1}{Z} \\Big( \\prod_{m=1}^{M} p_{m,k} \\Big)^{1/M}

    The same as the softmax of the mean of the networks' logits; Heskes (1998) calls it the
    logarithmic opinion pool.
    """
    return torch.stack(list(members)).clamp_min(SMALLEST).log().mean(0).softmax(1)


class Interval(NamedTuple):
    """An estimate with an interval around it."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor], *, seed: int = 0
) -> Interval:
    """A 95 % interval for a function of means over images, all predictors on the same images.

    Whole images are drawn with replacement, as many as there are, so that what an image does to
    one predictor stays with what it does to the others; the interval lies between two percentiles
    of the statistic over 4000 draws (Efron and Tibshirani, 1993, chapter 13). It tells how the
    result would change with other images, not with other networks.

    Parameters
    ----------
    values
        (n, k): for each image one number a predictor, such as 1 where it is wrong, else 0.
    statistic
        From the means (draws, k) to (draws,). The difference of two predictors is
        ``lambda means: means[:, 1] - means[:, 0]``.
    seed
        Of the drawing.

    Raises
    ------
    ValueError
        If ``values`` is not (n, k) with at least one image.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values has the shape {tuple(values.shape)}; it must be (images, k)")
    values = values.double()
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for some in torch.arange(_DRAWS).split(max(1, _AT_ONCE // n)):
        chosen = torch.randint(n, (len(some), n), generator=generator)
        means = [column[chosen].mean(1) for column in values.unbind(1)]
        found.append(statistic(torch.stack(means, 1)))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(found).double().quantile(tails).tolist()
    return Interval(float(statistic(values.mean(0, keepdim=True))), low, high)
