"""Normalization, ReLU and pooling of the stem, computed again instead of kept.

The stem's maps are the network's largest.  Between its convolutions autograd keeps, for each image,
the input of the normalization, the output of ReLU and an index of eight bytes for every maximum of
the pooling.  All but the first follow from the first, at the price of passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

__all__ = ["norm_relu_pool"]


class _NormReLUPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = norm.eps
        return F.max_pool2d(F.relu_(norm(x)), 3, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.eps)
            y = F.max_pool2d(F.relu_(y), 3, 2, ceil_mode=True)
        return *torch.autograd.grad(y, (x, weight, bias), grads[0]), None


def norm_relu_pool(x: Tensor, norm: nn.Module) -> Tensor:
    """``max_pool2d(relu(norm(x)), 3, 2, ceil_mode=True)`` in training, keeping only ``x``.

    Parameters
    ----------
    x
        Tensor (N, C, H, W).
    norm
        A ``torch.nn.BatchNorm2d`` in training mode; its running statistics move once.

    Returns
    -------
    torch.Tensor
        (N, C, H/2, W/2), sizes rounded up as the pooling does.
    """
    return _NormReLUPool.apply(x, norm.weight, norm.bias, norm)
