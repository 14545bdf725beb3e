"""Who computes ``batch_norm``: the formulas, or the kernels, which are faster on large tensors.

The formulas (``bnlib._core.formulas``) serve where each operation is watched: by ``torch.compile``,
by a transform of ``torch.func``, by forward-mode differentiation, or by autograd when a derivative
is to be differentiated again.  All further derivatives follow from those of plain operations.

Elsewhere :class:`_Training` gives autograd the compact derivative, so that the graph keeps x and
not every intermediate result.  Up to ``SMALL`` values, where the number of operations counts and
not the trips to memory, it computes by the formulas too, and keeps x_hat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from bnlib._core import formulas, kernels
from bnlib._core.channels import wide_dtype

SMALL = 2**17  # values; from 2**17 to 2**18 the two ways measure alike on a CPU


def train(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y of Algorithm 1, and the mean and the biased variance of each channel, detached."""
    if x.numel() == 0:
        nothing = x.new_zeros(x.shape[1], dtype=wide_dtype(x.dtype))
        return formulas.infer(x, nothing, nothing, gamma, beta, eps), nothing, nothing.clone()
    if _watched():
        x_hat, mean, var, _ = formulas.normalize(x, eps)
        y = formulas.scale_and_shift(x_hat, gamma, beta).to(x.dtype)
        return y, mean.detach(), var.detach()
    result: tuple[Tensor, Tensor, Tensor] = _Training.apply(x, *_defaults(x, gamma, beta), eps)
    return result


def infer(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """y of Algorithm 2, line 11."""
    tensors = [t for t in (x, mean, var, gamma, beta) if t is not None]
    needs_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if _watched() or needs_graph or x.numel() <= SMALL:
        return formulas.infer(x, mean, var, gamma, beta, eps)
    gamma, beta = _defaults(x, gamma, beta)
    scale = gamma * torch.rsqrt(var + eps)
    pivot, residual = kernels.pivot(mean, var)
    return kernels.affine(x, pivot, scale, beta - residual * scale)


class _Training(Function):
    """(x, gamma, beta, eps) -> (y, mean, var); y alone has a derivative."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept: tuple[Tensor | None, ...]
        if x.numel() <= SMALL:
            x_hat, mean, var, inv_std = formulas.normalize(x, eps)
            y = formulas.scale_and_shift(x_hat, gamma, beta).to(x.dtype)
            kept = (x_hat, inv_std)
        else:
            pivot, residual, var = kernels.moments(x)
            inv_std = torch.rsqrt(var + eps)
            scale = gamma * inv_std
            y = kernels.affine(x, pivot, scale, beta - residual * scale)
            mean = residual if pivot is None else pivot + residual
            kept = (pivot, residual, inv_std)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        ctx.save_for_backward(x, gamma, *kept)
        ctx.eps = eps
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = grads[0]
        if grad_y is None:
            return None, None, None, None
        x, gamma, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or is_legacy_batchedtensor(grad_y) or _watched():
            # from x and gamma alone: what ``forward`` kept has no graph
            x_hat, _, _, inv_std = formulas.normalize(x, ctx.eps)
            return *formulas.derivative(grad_y, x_hat, inv_std, gamma), None
        if x.numel() <= SMALL:
            x_hat, inv_std = kept
            return *formulas.derivative(grad_y, x_hat, inv_std, gamma), None
        pivot, residual, inv_std = kept
        return *kernels.gradients(grad_y, x, pivot, residual, inv_std, gamma), None


def _watched() -> bool:
    """Whether something other than reverse-mode autograd may follow each operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _defaults(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(x.dtype)
    return (
        x.new_ones(x.shape[1], dtype=dtype) if gamma is None else gamma,
        x.new_zeros(x.shape[1], dtype=dtype) if beta is None else beta,
    )
