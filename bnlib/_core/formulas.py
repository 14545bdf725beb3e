"""Algorithm 1, its compact derivative and Algorithm 2, line 11: the arithmetic, in few lines.

Ordinary tensor operations on arguments that are already checked: autograd, ``torch.func`` and
``torch.compile`` can follow them.  :mod:`bnlib.functional` documents what they compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnlib._core.channels import batch_axes, count, per_channel, wide_dtype


def center(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean`` in the wide type, and the mean of each channel; differentiable in ``x``.

    The mean of large values is rounded to a few digits after the point.  What the rounding left is
    the mean of the centered values, and is taken off them; this is what keeps x = 1e6 + noise
    sound.  Subtracting the first, rounded mean as a constant changes no derivative.
    """
    wide, axes = x.to(wide_dtype(x.dtype)), batch_axes(x)
    rounded = wide.detach().mean(axes, keepdim=True)
    centered = wide - rounded
    left = centered.mean(axes, keepdim=True)
    return centered - left, (rounded + left).reshape(-1)


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first three lines of Algorithm 1: x_hat; mean, biased variance, inverse deviation."""
    centered, mean = center(x)  # mu_B and x - mu_B
    var = centered.square().mean(batch_axes(x))  # sigma_B^2
    inv_std = torch.rsqrt(var + eps)
    return centered * per_channel(inv_std, x), mean, var, inv_std


def scale_and_shift(x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """``gamma * x_hat + beta``: the last line of Algorithm 1."""
    y = x_hat if gamma is None else x_hat * per_channel(gamma, x_hat)
    return y if beta is None else y + per_channel(beta, x_hat)


def derivative(
    grad_y: Tensor, x_hat: Tensor, inv_std: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The compact form: derivatives with respect to x, gamma and beta."""
    axes, m = batch_axes(x_hat), max(count(x_hat), 1)
    g = grad_y.to(x_hat.dtype)
    grad_gamma = (g * x_hat).sum(axes)
    grad_beta = g.sum(axes)
    scale = inv_std if gamma is None else gamma * inv_std
    rest = torch.sub(g, per_channel(grad_beta, g), alpha=1 / m)
    rest = torch.addcmul(rest, x_hat, per_channel(grad_gamma, g), value=-1 / m)
    grad_x = per_channel(scale, x_hat) * rest
    return grad_x.to(grad_y.dtype), grad_gamma, grad_beta


def infer(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Algorithm 2, line 11, with one multiplication for each value."""
    inv_std = torch.rsqrt(var + eps)
    scale = inv_std if gamma is None else gamma * inv_std
    centered = x.to(wide_dtype(x.dtype)) - per_channel(mean, x)
    return scale_and_shift(centered, scale, beta).to(x.dtype)
