"""How far a network's probabilities can be believed: calibration, proper scores, temperature.

A network is calibrated if, of the images to which it gives its first class with a probability of
80 %, it has 80 % right. Probabilities are (n, classes), each row summing to one; labels are int64
(n,). Shapes that do not fit, or no image, are a ``ValueError``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnlib.imagenet.evaluation.ensembles import SMALLEST

__all__ = [
    "Reliability",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "log_losses",
    "reliability",
    "with_temperature",
]


class Reliability(NamedTuple):
    """Images in bins of confidence, the probability of the most probable class."""

    confidence: Tensor  #: mean of each bin, float64 (bins,)
    accuracy: Tensor  #: fraction of each bin's images that are right, float64 (bins,)
    images: Tensor  #: number in each bin, int64 (bins,)


def _checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The probabilities as float64."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities have the shape {tuple(probabilities.shape)} and labels "
            f"{tuple(labels.shape)}; (n, classes) and (n,) with at least one image are needed"
        )
    return probabilities.double()


def log_losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Minus the logarithm of the right class's probability, for every image: nats, float64 (n,).

    Their mean is the cross-entropy. A probability below ``1e-12`` counts as ``1e-12``.
    """
    right = _checked(probabilities, labels).gather(1, labels[:, None])[:, 0]
    return -right.clamp_min(SMALLEST).log()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the right answer (Brier, 1950).

    .. math:: \\frac{1}{n} \\sum_i \\sum_k (p_{ik} - [y_i = k])^2

    From 0, certain and right, to 2, certain and wrong.
    """
    probabilities = _checked(probabilities, labels)
    right = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - right).square().sum(1).mean())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins that hold equally many images (up to one).

    Bins of equal width, as in Guo et al. (2017), leave some with hardly an image; with bins of
    equal mass (Nixon et al., 2019) every point of the curve is equally sure. A number of bins that
    is not from 1 to n is a ``ValueError``.
    """
    confidence, first = _checked(probabilities, labels).max(1)
    if not 1 <= bins <= len(labels):
        raise ValueError(f"bins is {bins}; with {len(labels)} images it must be 1 to {len(labels)}")
    order = confidence.argsort(stable=True)
    right = (first == labels).double()
    parts = order.tensor_split(bins)
    return Reliability(
        torch.stack([confidence[part].mean() for part in parts]),
        torch.stack([right[part].mean() for part in parts]),
        torch.tensor([len(part) for part in parts]),
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """How far confidence is from accuracy, mean over images by bins (Naeini et al., 2015).

    .. math:: \\mathrm{ECE} = \\sum_b \\frac{n_b}{n} \\, | \\mathrm{acc}_b - \\mathrm{conf}_b |

    with the bins of :func:`reliability`. It is above zero even for a calibrated network, as each
    bin has finitely many images.
    """
    found = reliability(probabilities, labels, bins)
    gaps = (found.accuracy - found.confidence).abs()
    return float((gaps * found.images).sum() / found.images.sum())


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities after the logits have been divided by a temperature (Guo et al., 2017).

    .. math:: p_k \\mapsto p_k^{1/T} / \\textstyle\\sum_j p_j^{1/T}

    Above 1 it makes less sure, below 1 more; the order of the classes stays. One that is not
    positive is a ``ValueError``.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return (probabilities.clamp_min(SMALLEST).log() / temperature).softmax(1)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature from 0.01 to 100 with the smallest mean log loss (Guo et al., 2017).

    The loss is convex in :math:`\\beta = 1/T`; its derivative is the mean over images of the
    expectation of :math:`\\log p` under :math:`p^\\beta` less :math:`\\log p` of the right class,
    and the temperature is where it changes its sign. Fit it on other images than those that it is
    judged on.
    """
    logs = _checked(probabilities, labels).clamp_min(SMALLEST).log()
    right = logs.gather(1, labels[:, None])[:, 0]
    low, high = 0.01, 100.0
    for _ in range(60):
        beta = (low * high) ** 0.5
        slope = ((beta * logs).softmax(1) * logs).sum(1).mean() - right.mean()
        low, high = (beta, high) if slope < 0 else (low, beta)
    return (low * high) ** -0.5
