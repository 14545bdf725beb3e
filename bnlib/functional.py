"""Algorithm 1 of Ioffe & Szegedy (2015), its derivative, and the transform used at inference.

Pure functions on tensors of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).  Axis 1
holds the channels: the paper's activations, or its feature maps.  Statistics go over every other
axis, so that a feature map has one mean, one variance and one (gamma, beta) (section 3.2).

float16 and bfloat16 tensors are computed in float32; gamma, beta and population statistics may
then be float32 or have the type of x.  Nothing here changes its arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnlib._core import autograd, formulas
from bnlib._core.channels import (
    batch_axes,
    check_eps,
    check_input,
    check_like,
    check_population,
    check_values,
    check_vector,
    count,
    per_channel,
)

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
    """Everything Algorithm 1 computes; see :func:`batch_norm_forward`."""

    y: Tensor  #: output, shape and dtype of x
    x_hat: Tensor  #: normalized values, shape of x
    mean: Tensor  #: mini-batch mean, shape (C,)
    var: Tensor  #: biased mini-batch variance, shape (C,)
    inv_std: Tensor  #: 1 / sqrt(var + eps), shape (C,)


class BatchNormGradients(NamedTuple):
    """Derivatives of the loss; see :func:`batch_norm_backward`."""

    x: Tensor  #: shape of x, dtype of the upstream gradient
    gamma: Tensor  #: shape (C,)
    beta: Tensor  #: shape (C,)


class BatchNormSteps(NamedTuple):
    """Derivatives of the loss, one for each of the paper's six lines, in the paper's order."""

    x_hat: Tensor  #: shape of x
    var: Tensor  #: shape (C,)
    mean: Tensor  #: shape (C,)
    x: Tensor  #: shape of x, dtype of the upstream gradient
    gamma: Tensor  #: shape (C,)
    beta: Tensor  #: shape (C,)


def batch_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalize each channel over the mini-batch, then scale and shift it (Algorithm 1).

    Gradients with respect to x, gamma and beta come from the closed form of section 3 (see
    :func:`batch_norm_backward`), and gradients of these gradients from its derivative.
    ``torch.func`` transforms (``grad``, ``vmap``, ``jvp``, ``hessian`` ...) and ``torch.compile``
    work.

    Parameters
    ----------
    x
        Mini-batch of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), of dtype float16,
        bfloat16, float32 or float64, in any memory format.  An empty mini-batch gives an empty
        result.
    gamma, beta
        Scale and shift of shape (C,), of the dtype of ``x`` (or float32 for a half-precision
        ``x``). None stands for ones and for zeros.
    eps
        The constant added to the variance, in squared units of ``x``.

    Returns
    -------
    torch.Tensor
        y, with the shape and dtype of ``x``.

    Raises
    ------
    ValueError
        If ``x`` has a shape not named above or a single value in each channel, if ``gamma`` or
        ``beta`` is not of shape (C,), or if ``eps`` is not positive and finite.
    TypeError
        If an argument is no tensor, or its dtype is not named above.

    Notes
    -----
    Memory: the graph keeps ``x`` and a few numbers for each channel, and the normalized values of a
    small ``x`` (2**17 values or fewer), where that is what costs the least time.
    """
    return batch_norm_with_statistics(x, gamma, beta, eps)[0]


def batch_norm_with_statistics(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Both :func:`batch_norm` and the statistics it used, as running averages need them.

    Parameters and errors are those of :func:`batch_norm`.

    Returns
    -------
    tuple of torch.Tensor
        y; the mean and the biased variance of each channel, of shape (C,), in float32 for a
        half-precision ``x`` and detached: no gradient flows through these two.  Of an empty
        mini-batch both are zero.
    """
    _check_training(x, gamma, beta, eps)
    return autograd.train(x, gamma, beta, eps)


def batch_norm_forward(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> BatchNormForward:
    """Algorithm 1 line by line, with everything it computes on the way.

    Made of ordinary tensor operations, so that autograd differentiates it by itself: the reference
    for the closed forms.  :func:`batch_norm` gives the same y faster.  Parameters and errors are
    those of :func:`batch_norm`.

    Returns
    -------
    BatchNormForward
        y, with the shape and dtype of ``x``; x_hat, of the shape of ``x``; mean, biased variance
        and inverse standard deviation, of shape (C,).  All but y are float32 for a half-precision
        ``x``.
    """
    _check_training(x, gamma, beta, eps)
    x_hat, *statistics = formulas.normalize(x, eps)
    y = formulas.scale_and_shift(x_hat, gamma, beta).to(x.dtype)
    return BatchNormForward(y, x_hat, *statistics)


def batch_norm_backward(
    grad_y: Tensor, x_hat: Tensor, inv_std: Tensor, gamma: Tensor | None = None
) -> BatchNormGradients:
    r"""The derivative of :func:`batch_norm` in its compact form.

    The paper's six lines, collected for :math:`g_i = \partial\ell / \partial y_i`:

    .. math::

        \frac{\partial\ell}{\partial x_i} = \frac{\gamma}{m \sqrt{\sigma_B^2 + \epsilon}}
        \Big( m\, g_i - \sum_j g_j - \hat x_i \sum_j g_j \hat x_j \Big)

    Parameters
    ----------
    grad_y
        Derivative of the loss with respect to y, of the shape of ``x_hat``.
    x_hat, inv_std
        As :func:`batch_norm_forward` returns them.
    gamma
        The scale given to :func:`batch_norm_forward`, of shape (C,); None stands for ones.

    Returns
    -------
    BatchNormGradients
        Derivatives with respect to x (of the dtype of ``grad_y``), gamma and beta (of the dtype of
        ``x_hat``; also where they were None).

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is no floating-point tensor.
    """
    check_input(x_hat, "x_hat")
    check_like(grad_y, "grad_y", x_hat, "x_hat")
    check_vector(inv_std, "inv_std", x_hat, "x_hat")
    check_vector(gamma, "gamma", x_hat, "x_hat")
    return BatchNormGradients(*formulas.derivative(grad_y, x_hat, inv_std, gamma))


def batch_norm_backward_steps(
    grad_y: Tensor, x: Tensor, gamma: Tensor | None = None, eps: float = 1e-5
) -> BatchNormSteps:
    """The derivative of :func:`batch_norm` in the six lines that section 3 of the paper prints.

    Parameters
    ----------
    grad_y
        Derivative of the loss with respect to y, of the shape of ``x``.
    x, gamma, eps
        As given to :func:`batch_norm`.

    Returns
    -------
    BatchNormSteps
        Derivatives with respect to x_hat, var, mean, x, gamma and beta: in float32 for a
        half-precision ``x``, but x of the dtype of ``grad_y``.

    Raises
    ------
    ValueError, TypeError
        As :func:`batch_norm`, and if ``grad_y`` does not have the shape of ``x``.
    """
    _check_training(x, gamma, None, eps)
    check_like(grad_y, "grad_y", x, "x")
    axes, m = batch_axes(x), max(count(x), 1)
    centered, _ = formulas.center(x)  # x_i - mu_B
    root = torch.sqrt(centered.square().mean(axes) + eps)  # sqrt(sigma_B^2 + eps)
    std = per_channel(root, x)
    g = grad_y.to(centered.dtype)  # dl/dy_i

    # dl/dx_hat_i = dl/dy_i gamma
    grad_x_hat = formulas.scale_and_shift(g, gamma, None)
    # dl/dsigma_B^2 = sum_i dl/dx_hat_i (x_i - mu_B) (-1/2) (sigma_B^2 + eps)^(-3/2)
    grad_var = (grad_x_hat * centered).sum(axes) * -0.5 * root**-3
    # dl/dmu_B = (sum_i dl/dx_hat_i (-1) / sqrt(sigma_B^2 + eps))
    #            + dl/dsigma_B^2 (sum_i -2 (x_i - mu_B)) / m        [the last sum is zero]
    grad_mean = (grad_x_hat * -1 / std).sum(axes) + grad_var * (-2 * centered).sum(axes) / m
    # dl/dx_i = dl/dx_hat_i / sqrt(sigma_B^2 + eps) + dl/dsigma_B^2 2 (x_i - mu_B) / m
    #           + dl/dmu_B / m
    grad_x = (
        grad_x_hat / std
        + per_channel(grad_var, x) * 2 * centered / m
        + per_channel(grad_mean, x) / m
    )
    # dl/dgamma = sum_i dl/dy_i x_hat_i
    grad_gamma = (g * centered / std).sum(axes)
    # dl/dbeta = sum_i dl/dy_i
    grad_beta = g.sum(axes)
    return BatchNormSteps(
        grad_x_hat, grad_var, grad_mean, grad_x.to(grad_y.dtype), grad_gamma, grad_beta
    )


def batch_norm_inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift each channel with fixed statistics (Algorithm 2, line 11).

    Every value is transformed by itself: the result does not depend on the rest of the batch, and
    a single value in each channel is fine.  Differentiable, any number of times, in all tensors.

    Parameters
    ----------
    x, gamma, beta, eps
        As in :func:`batch_norm`.
    mean, var
        Population mean and variance of shape (C,), of the dtype of ``x`` (or float32 for a
        half-precision ``x``).

    Returns
    -------
    torch.Tensor
        y, with the shape and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        As :func:`batch_norm`, and if ``mean`` or ``var`` holds NaN or infinity, or ``var`` a
        negative value.  The values are looked at on the CPU, outside ``torch.compile`` and
        ``torch.func``; a GPU would have to wait, and there such statistics show as NaN in y.
    """
    check_input(x)
    check_eps(eps)
    for vector, name in ((mean, "mean"), (var, "var"), (gamma, "gamma"), (beta, "beta")):
        check_vector(vector, name, x)
    if not torch.compiler.is_compiling():
        check_population(mean, var)
    return autograd.infer(x, mean, var, gamma, beta, eps)


def _check_training(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> None:
    check_input(x)
    check_values(x)
    check_eps(eps)
    check_vector(gamma, "gamma", x)
    check_vector(beta, "beta", x)
