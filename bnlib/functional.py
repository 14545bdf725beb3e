"""Algorithm 1 of Ioffe & Szegedy (2015), its derivative, and the transform used at inference.

Pure functions on tensors of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).  Axis 1
holds the channels (the paper's activations or feature maps); statistics go over every other axis,
so that a feature map shares one mean, one variance and one (gamma, beta) (section 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnlib._autograd import InferenceTransform, TrainingTransform
from bnlib._channels import batch_axes, center, per_channel, wide_dtype

__all__ = [
    "BatchNormForward",
    "BatchNormGradients",
    "BatchNormSteps",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_steps",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_with_statistics",
]


class BatchNormForward(NamedTuple):
    """What the training transform computes."""

    y: Tensor
    x_hat: Tensor
    mean: Tensor
    var: Tensor
    inv_std: Tensor


class BatchNormGradients(NamedTuple):
    """Derivatives of the loss."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


class BatchNormSteps(NamedTuple):
    """Derivatives of the loss, one for each of the paper's six lines, in the paper's order."""

    x_hat: Tensor
    var: Tensor
    mean: Tensor
    x: Tensor
    gamma: Tensor
    beta: Tensor


def batch_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalize each channel over the mini-batch, then scale and shift it."""
    return batch_norm_with_statistics(x, gamma, beta, eps)[0]


def batch_norm_with_statistics(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm`, with the mini-batch mean and biased variance (without derivative)."""
    if torch.compiler.is_compiling():
        result = batch_norm_forward(x, gamma, beta, eps)
        return result.y, result.mean.detach(), result.var.detach()
    vector = x.new_ones(x.shape[1], dtype=wide_dtype(x.dtype))
    gamma = vector if gamma is None else gamma
    beta = torch.zeros_like(vector) if beta is None else beta
    y, pivot, residual, var, _ = TrainingTransform.apply(x, gamma, beta, eps)
    return y, residual if pivot is None else pivot + residual, var


def batch_norm_forward(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> BatchNormForward:
    """Algorithm 1, with everything it computes on the way."""
    centered, mean = center(x)
    var = centered.square().mean(batch_axes(x))
    inv_std = torch.rsqrt(var + eps)
    x_hat = centered * per_channel(inv_std, x)
    y = x_hat
    if gamma is not None:
        y = y * per_channel(gamma, x)
    if beta is not None:
        y = y + per_channel(beta, x)
    return BatchNormForward(y.to(x.dtype), x_hat, mean, var, inv_std)


def batch_norm_backward(
    grad_y: Tensor, x_hat: Tensor, inv_std: Tensor, gamma: Tensor | None = None
) -> BatchNormGradients:
    """The derivative in its compact form."""
    axes = batch_axes(x_hat)
    g = grad_y.to(x_hat.dtype)
    m = x_hat.numel() // max(x_hat.shape[1], 1)
    grad_gamma = (g * x_hat).sum(axes)
    grad_beta = g.sum(axes)
    scale = inv_std if gamma is None else gamma * inv_std
    grad_x = per_channel(scale, x_hat) * (
        g - per_channel(grad_beta / m, x_hat) - x_hat * per_channel(grad_gamma / m, x_hat)
    )
    return BatchNormGradients(grad_x.to(grad_y.dtype), grad_gamma, grad_beta)


def batch_norm_backward_steps(
    grad_y: Tensor, x: Tensor, gamma: Tensor | None = None, eps: float = 1e-5
) -> BatchNormSteps:
    """The derivative line by line, as section 3 of the paper prints it."""
    axes = batch_axes(x)
    m = x.numel() // max(x.shape[1], 1)
    centered, _ = center(x)
    var = centered.square().mean(axes)
    g = grad_y.to(centered.dtype)
    root = per_channel(torch.sqrt(var + eps), x)

    grad_x_hat = g if gamma is None else g * per_channel(gamma, x)
    grad_var = (grad_x_hat * centered * -0.5 * root**-3).sum(axes)
    grad_mean = (grad_x_hat * -1 / root).sum(axes) + grad_var * (-2 * centered).sum(axes) / m
    grad_x = (
        grad_x_hat / root
        + per_channel(grad_var, x) * 2 * centered / m
        + per_channel(grad_mean, x) / m
    )
    grad_gamma = (g * centered / root).sum(axes)
    grad_beta = g.sum(axes)
    return BatchNormSteps(
        grad_x_hat, grad_var, grad_mean, grad_x.to(x.dtype), grad_gamma, grad_beta
    )


def batch_norm_inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Algorithm 2, line 11: the fixed affine transform with population statistics."""
    wide = x.to(wide_dtype(x.dtype))
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    y = (wide - per_channel(mean, x)) * per_channel(scale, x)
    if beta is not None:
        y = y + per_channel(beta, x)
    return y.to(x.dtype)
