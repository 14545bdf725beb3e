"""The mean of several networks' probabilities, and two scores of probabilities.

Every probability tensor is (n, classes): a row an image, a column a class, each row summing to one;
labels are int64 (n,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["arithmetic_mean", "brier_score", "log_losses"]

_SMALLEST = 1e-12  # a recorded probability that was rounded to zero has a finite log loss


def arithmetic_mean(members: Sequence[Tensor]) -> Tensor:
    """The mean of the networks' probabilities: the paper's ensemble (section 4.2.3)."""
    return torch.stack(list(members)).mean(0)


def log_losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Minus the logarithm of the right class's probability, for every image: nats, float64 (n,).

    Their mean is the cross-entropy. A probability below ``1e-12`` counts as ``1e-12``; shapes that
    do not fit, or no image, are a ``ValueError``.
    """
    right = _checked(probabilities, labels).gather(1, labels[:, None])[:, 0]
    return -right.clamp_min(_SMALLEST).log()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the right answer (Brier, 1950).

    .. math:: \\frac{1}{n} \\sum_i \\sum_k (p_{ik} - [y_i = k])^2

    From 0, certain and right, to 2, certain and wrong. Shapes that do not fit, or no image, are a
    ``ValueError``.
    """
    probabilities = _checked(probabilities, labels)
    right = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - right).square().sum(1).mean())


def _checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The probabilities as float64."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities have the shape {tuple(probabilities.shape)} and labels "
            f"{tuple(labels.shape)}; (n, classes) and (n,) with at least one image are needed"
        )
    return probabilities.double()
