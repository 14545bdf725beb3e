"""What a set of numbers looks like: percentiles, moments, distances, nearness to a Gaussian.

Pure functions on samples. Each takes the sample along one axis and keeps the others, so that one
call serves one unit, a layer of units or a whole tensor. Half-precision and integer samples are
computed in float32; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Gaussianity",
    "Moments",
    "gaussianity",
    "ks_distance_to_normal",
    "moments",
    "negentropy",
    "percentiles",
    "saturated_fraction",
    "wasserstein",
]


class Moments(NamedTuple):
    """The first four moments; each a tensor of the sample's shape without its sample axis."""

    mean: Tensor
    std: Tensor
    skewness: Tensor
    excess_kurtosis: Tensor


class Gaussianity(NamedTuple):
    """How far from a Gaussian; all four vanish for a Gaussian and a sample without end."""

    skewness: Tensor
    excess_kurtosis: Tensor
    negentropy: Tensor
    ks_distance: Tensor


def _sample(x: Tensor, dim: int | None, name: str = "x") -> Tensor:
    """The sample as floating point, its axis moved to the front: ``(n, ...)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; try torch.as_tensor")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}; take its real part or absolute value")
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if dim is None:
        x = x.flatten()
    elif -x.ndim <= dim < x.ndim:
        x = x.movedim(dim, 0)
    else:
        raise ValueError(
            f"dim must name an axis of {name}, from {-x.ndim} to {x.ndim - 1}, or be None for all "
            f"of them; got {dim} for the shape {tuple(x.shape)}"
        )
    if not len(x):
        raise ValueError(f"{name} holds no sample along dim={dim}: its shape is {tuple(x.shape)}")
    return x


def percentiles(x: Tensor, ranks: Sequence[float] = (15, 50, 85), dim: int | None = None) -> Tensor:
    """Percentiles, with linear interpolation between neighbors (numpy's default).

    Figure 1 of the paper shows the 15th, 50th and 85th. Unlike ``torch.quantile`` this takes
    samples of any size.

    Parameters
    ----------
    x
        The sample, any real dtype.
    ranks
        Each from 0 to 100.
    dim
        The axis of the sample; None takes all elements as one sample.

    Returns
    -------
    Tensor
        ``(len(ranks), ...)``: the other axes of ``x`` follow. NaN where the sample holds NaN.

    Raises
    ------
    ValueError
        For a rank outside [0, 100] or an empty sample.
    """
    bad = [rank for rank in ranks if not 0 <= rank <= 100]
    if bad or not len(ranks):
        raise ValueError(f"percentiles lie in [0, 100], at least one; got {bad or list(ranks)}")
    x = _sample(x, dim)
    ordered = x.sort(dim=0).values
    position = torch.tensor(ranks, dtype=torch.float64) / 100 * (len(x) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(x) - 1)
    weight = (position - below).to(x).view(-1, *[1] * (x.ndim - 1))
    low, high = ordered[below.to(x.device)], ordered[above.to(x.device)]
    # An infinite neighbor must not turn 0 * inf into NaN.
    result = torch.where(weight == 0, low, low.lerp(high, weight))
    return torch.where(x.isnan().any(0), torch.nan, result)


def moments(x: Tensor, dim: int | None = None) -> Moments:
    """Mean, standard deviation, skewness and excess kurtosis of the sample itself.

    All four divide by the sample's size (the biased estimators, as in Algorithm 1). Skewness is
    0 for a symmetric distribution; excess kurtosis is 0 for a Gaussian, -1.2 for a uniform one.

    Parameters
    ----------
    x
        The sample, any real dtype.
    dim
        The axis of the sample; None takes all elements as one sample.

    Returns
    -------
    Moments
        Skewness and kurtosis are NaN where the sample is constant up to rounding.
    """
    x = _sample(x, dim)
    mean, std, z = _standardized(x)
    return Moments(mean, std, z.pow(3).mean(0), z.pow(4).mean(0) - 3)


def _standardized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation, and the sample with mean 0 and deviation 1."""
    mean = x.mean(0)
    centered = x - mean
    std = centered.square().mean(0).sqrt()
    # A constant sample leaves only the rounding of its mean, whose shape means nothing.
    rounding = torch.finfo(x.dtype).eps * mean.abs()
    return mean, std, centered / torch.where(std > rounding, std, torch.nan)


def wasserstein(a: Tensor, b: Tensor, dim: int | None = None) -> Tensor:
    """The exact Wasserstein-1 distance between two samples on the line.

    The least mean distance that the points of one sample must be moved to become the other; also
    the area between the two cumulative distributions. In the unit of the samples.

    Parameters
    ----------
    a, b
        Two samples; sizes may differ along ``dim`` only.
    dim
        The axis of the sample; None takes all elements as one sample.

    Returns
    -------
    Tensor
        The other axes' shape; NaN where a sample holds NaN.

    Raises
    ------
    ValueError
        If the other axes differ.
    """
    a, b = _sample(a, dim, "a"), _sample(b, dim, "b")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"a and b must agree outside dim={dim}; there they have the shapes "
            f"{tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        )
    a, b = a.to(torch.promote_types(a.dtype, b.dtype)), b.to(torch.promote_types(a.dtype, b.dtype))
    if len(a) == len(b):
        return (a.sort(dim=0).values - b.sort(dim=0).values).abs().mean(0)
    # Both quantile functions are steps; integrate |difference| over their common intervals.
    n, m = len(a), len(b)
    edges = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = torch.diff(edges, prepend=edges.new_zeros(1)).to(a) / (n * m)
    quantile_a = a.sort(dim=0).values[((edges - 1) // m).to(a.device)]
    quantile_b = b.sort(dim=0).values[((edges - 1) // n).to(b.device)]
    return torch.tensordot(width, (quantile_a - quantile_b).abs(), dims=1)


def negentropy(x: Tensor, dim: int | None = None) -> Tensor:
    """Hyvärinen's approximation of negentropy, in nats.

    Negentropy is the entropy of the Gaussian with the sample's mean and variance less the sample's
    own entropy: never negative, 0 only for a Gaussian. The approximation replaces the entropy by
    two bounded moments of the standardized sample, ``E[y exp(-y^2/2)]`` (asymmetry) and
    ``E[exp(-y^2/2)]`` (peakedness), which outliers sway less than skewness and kurtosis.

    Parameters
    ----------
    x, dim
        As in :func:`moments`.

    Returns
    -------
    Tensor
        Nats, at least 0; NaN where the sample is constant.

    Notes
    -----
    A. Hyvärinen, "New approximations of differential entropy for independent component analysis
    and projection pursuit", NIPS 1997. A Gaussian sample of size n gives about 1.1 / n, not 0.
    """
    _, _, y = _standardized(_sample(x, dim))
    bell = (-y.square() / 2).exp()
    asymmetry = (y * bell).mean(0)
    peak = bell.mean(0) - math.sqrt(1 / 2)
    k1 = 36 / (8 * math.sqrt(3) - 9)
    k2 = 24 / (16 * math.sqrt(3) - 27)
    return k1 * asymmetry.square() + k2 * peak.square()


def ks_distance_to_normal(x: Tensor, dim: int | None = None) -> Tensor:
    """The Kolmogorov-Smirnov distance to the Gaussian with the sample's mean and deviation.

    The largest gap between the sample's cumulative distribution and the Gaussian's, from 0 to 1.
    A Gaussian sample of size n gives about ``0.6 / sqrt(n)``.

    Parameters
    ----------
    x, dim
        As in :func:`moments`.

    Returns
    -------
    Tensor
        From 0 to 1; NaN where the sample is constant.
    """
    _, _, y = _standardized(_sample(x, dim))
    y, n = y.sort(dim=0).values, len(y)
    normal = torch.special.ndtr(y)
    step = torch.arange(n + 1, device=y.device).to(y).view(-1, *[1] * (y.ndim - 1)) / n
    return torch.maximum((step[1:] - normal).amax(0), (normal - step[:-1]).amax(0))


def gaussianity(x: Tensor, dim: int | None = None) -> Gaussianity:
    """Four measures of how far a sample is from a Gaussian.

    Parameters
    ----------
    x, dim
        As in :func:`moments`.

    Returns
    -------
    Gaussianity
        Skewness and excess kurtosis (signed), negentropy (nats) and the Kolmogorov-Smirnov
        distance to the fitted Gaussian (0 to 1).
    """
    _, _, skewness, excess_kurtosis = moments(x, dim)
    return Gaussianity(skewness, excess_kurtosis, negentropy(x, dim), ks_distance_to_normal(x, dim))


def saturated_fraction(z: Tensor, slope: float = 0.1, dim: int | None = None) -> Tensor:
    """The fraction of sigmoid inputs at which the sigmoid is nearly flat.

    A sigmoid counts as saturated at ``z`` when its derivative there is below ``slope`` times the
    largest, 1/4. The default, a tenth, means ``|z| > 3.64``.

    Parameters
    ----------
    z
        Inputs of sigmoids, any shape.
    slope
        Between 0 and 1.
    dim
        The axis of the sample; None takes all elements as one sample.

    Returns
    -------
    Tensor
        Fractions from 0 to 1.

    Raises
    ------
    ValueError
        If ``slope`` lies outside (0, 1).
    """
    if not 0 < slope < 1:
        raise ValueError(f"slope is a fraction of the largest derivative, in (0, 1); got {slope}")
    z = _sample(z, dim)
    # sigmoid'(z) = 1 / (4 cosh(z/2)^2), so the bound on the slope is one on |z|.
    return (z.abs() > 2 * math.acosh(slope**-0.5)).to(z.dtype).mean(0)
