"""What a set of numbers looks like: percentiles, moments, distances, nearness to a Gaussian.

Each function takes the sample along the axis ``dim`` and keeps the others, so that one call serves
one unit or a layer of units; without ``dim`` all elements are one sample. Samples may have any real
dtype: float64 stays float64, everything else is computed in float32. An empty one is refused.
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
    "moments",
    "percentiles",
    "saturated_fraction",
    "wasserstein",
]


class Moments(NamedTuple):
    """The first four moments; each a tensor of the sample's shape without its sample axis."""

    mean: Tensor
    std: Tensor
    skewness: Tensor  #: 0 for a symmetric distribution
    excess_kurtosis: Tensor  #: 0 for a Gaussian, -1.2 for a uniform distribution


class Gaussianity(NamedTuple):
    """How far from a Gaussian; all four vanish for a Gaussian and a sample without end."""

    skewness: Tensor  #: signed
    excess_kurtosis: Tensor  #: signed
    negentropy: Tensor  #: nats, at least 0; of ``n`` Gaussian values about ``1.1 / n``
    ks_distance: Tensor  #: 0 to 1; of ``n`` Gaussian values about ``0.6 / sqrt(n)``


def _sample(x: Tensor, dim: int | None, name: str = "x") -> Tensor:
    """The sample as floating point, its axis moved to the front: ``(n, ...)``."""
    if not isinstance(x, Tensor) or x.is_complex():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {given}")
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    x = x.flatten() if dim is None else x.movedim(dim, 0)
    if not len(x):
        raise ValueError(f"{name} holds no sample along dim={dim}: its shape is {tuple(x.shape)}")
    return x


def percentiles(x: Tensor, ranks: Sequence[float] = (15, 50, 85), dim: int | None = None) -> Tensor:
    """Percentiles, with linear interpolation between neighbors (numpy's default).

    Figure 1 of the paper shows the 15th, 50th and 85th. Unlike ``torch.quantile`` this takes
    samples of any size. A ValueError names ranks outside [0, 100].

    Returns
    -------
    Tensor
        ``(len(ranks), ...)``: the other axes of ``x`` follow. NaN where the sample holds NaN.
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

    All four divide by the sample's size (the biased estimators, as in Algorithm 1). Skewness and
    kurtosis are NaN where the sample is constant up to rounding.
    """
    mean, std, z = _standardized(_sample(x, dim))
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
    """The Wasserstein-1 distance between two equally large samples on the line, in their unit.

    It is the least mean distance that the points of one must be moved to become the other. NaN
    where a sample holds NaN; a ValueError if the shapes differ.
    """
    a, b = _sample(a, dim, "a"), _sample(b, dim, "b")
    if a.shape != b.shape:
        raise ValueError(f"a and b must agree in shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    return (a.sort(dim=0).values - b.sort(dim=0).values).abs().mean(0)


def gaussianity(x: Tensor, dim: int | None = None) -> Gaussianity:
    """Four measures of how far a sample is from a Gaussian; NaN where the sample is constant.

    *Negentropy* is the entropy of the Gaussian with the sample's mean and variance less the
    sample's own entropy: never negative, 0 only for a Gaussian. Hyvärinen's approximation takes two
    bounded moments of the standardized sample in place of the entropy, ``E[z exp(-z^2/2)]``
    (asymmetry) and ``E[exp(-z^2/2)]`` (peakedness), which outliers sway less than skewness and
    kurtosis. The *Kolmogorov-Smirnov distance* is the largest gap between the sample's cumulative
    distribution and that of the Gaussian with its mean and deviation.

    Notes
    -----
    A. Hyvärinen, "New approximations of differential entropy for independent component analysis
    and projection pursuit", NIPS 1997.
    """
    _, _, z = _standardized(_sample(x, dim))
    bell = (-z.square() / 2).exp()
    asymmetry = (z * bell).mean(0)
    peak = bell.mean(0) - math.sqrt(1 / 2)
    k1 = 36 / (8 * math.sqrt(3) - 9)
    k2 = 24 / (16 * math.sqrt(3) - 27)
    normal = torch.special.ndtr(z.sort(dim=0).values)
    step = torch.arange(len(z) + 1).to(z).view(-1, *[1] * (z.ndim - 1)) / len(z)
    return Gaussianity(
        skewness=z.pow(3).mean(0),
        excess_kurtosis=z.pow(4).mean(0) - 3,
        negentropy=k1 * asymmetry.square() + k2 * peak.square(),
        ks_distance=torch.maximum((step[1:] - normal).amax(0), (normal - step[:-1]).amax(0)),
    )


def saturated_fraction(z: Tensor, dim: int | None = None) -> Tensor:
    """The fraction of sigmoid inputs at which the sigmoid is nearly flat, ``|z| > 3.64``.

    There its derivative is below a tenth of the largest, 1/4.
    """
    z = _sample(z, dim)
    # sigmoid'(z) = 1 / (4 cosh(z/2)^2), so the bound on the slope is one on |z|.
    return (z.abs() > 2 * math.acosh(0.1**-0.5)).to(z.dtype).mean(0)
