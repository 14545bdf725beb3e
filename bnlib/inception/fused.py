"""Batch normalization and ReLU in one operation, for training on a GPU.

Between two convolutions of the network stand a normalization and a ReLU.  Torch runs them one after
the other: a map is then read or written five times on the way forward and eight times on the way
back.  Here it is three and five (``benchmarks/gpu_training.py`` measures both).  Memory is the
same: the graph keeps x, as it does without; y is kept in any case, by the convolution behind.

The kernels are written in Triton, which comes with torch on Linux; nothing here imports it before
it is needed.  They run where all of this holds, else :func:`norm_relu` is torch's own two
operations:

* the map is on a CUDA device, float16, bfloat16 or float32, (N, C, H, W), channels last;
* the layer is in training, with gamma, beta, running statistics and a momentum;
* nothing else looks on: no hooks on the layer, no ``torch.compile``, which fuses by itself.

Not run on a GPU yet: the kernels have been compared with torch in Triton's interpreter only
(``TRITON_INTERPRET=1``, where they take maps on the CPU).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bnlib.inception.layers import ConvNormAct

__all__ = ["BatchNormReLU", "fuse_norm_relu", "norm_relu"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _launch() -> ModuleType | None:
    """The kernels; None without Triton."""
    try:
        return import_module("bnlib.inception._fused_launch")
    except ImportError:
        return None


class _NormReLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        one_launch: bool | None,
    ) -> Tensor:
        launch = _launch()
        assert launch is not None
        rows = x.movedim(1, -1).flatten(0, -2)
        ctx.one_launch = len(rows) <= launch.ONE_LAUNCH if one_launch is None else one_launch
        y, residual, inv_std = launch.forward(
            rows, gamma, beta, running_mean, running_var, momentum, eps, ctx.one_launch
        )
        ctx.save_for_backward(x, gamma, beta, residual, inv_std)
        return _like(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        launch = _launch()
        assert launch is not None
        x, gamma, beta, residual, inv_std = ctx.saved_tensors
        rows = x.movedim(1, -1).flatten(0, -2)
        upstream = grad_y.movedim(1, -1).flatten(0, -2)  # a view, or where there is none a copy
        if upstream.stride(1) != 1:
            upstream = upstream.contiguous()
        grad_x, grad_gamma, grad_beta = launch.backward(
            upstream, rows, gamma, beta, residual, inv_std, ctx.one_launch
        )
        return _like(grad_x, x), grad_gamma, grad_beta, None, None, None, None, None


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """(N H W, C) as (N, C, H, W), channels last."""
    n, c, height, width = x.shape
    return rows.view(n, height, width, c).permute(0, 3, 1, 2)


def norm_relu(
    x: Tensor, norm: nn.BatchNorm2d, act: nn.Module | None = None, *, one_launch: bool | None = None
) -> Tensor:
    """``relu(norm(x))``, in the fused kernels where they apply.

    Parameters
    ----------
    x
        Tensor (N, C, H, W).
    norm
        The normalization; its running statistics move as they do in torch.
    act
        What is called after ``norm`` where the kernels do not apply; a ReLU by default.
    one_launch
        Whether forward and backward pass are one launch each, a program for each group of
        channels.  None: where the map has few rows.

    Returns
    -------
    torch.Tensor
        (N, C, H, W), with the dtype of ``x``.

    Notes
    -----
    Statistics and arithmetic are float32.  The same input gives the same bits on the same device.
    Derivatives are the closed form of :func:`bnlib.functional.batch_norm_backward`; they cannot be
    differentiated again.
    """
    if not _applies(x, norm):
        y = _plain(x, norm)
        return F.relu(y) if act is None else act(y)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    running = norm.running_mean, norm.running_var
    y = _NormReLU.apply(x, norm.weight, norm.bias, *running, norm.momentum, norm.eps, one_launch)
    return y


def _plain(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return nn.BatchNorm2d.forward(norm, x) if isinstance(norm, BatchNormReLU) else norm(x)


def _applies(x: Any, norm: nn.Module) -> bool:
    """Whether the kernels compute what torch would, here."""
    return bool(
        isinstance(x, Tensor)  # torch.fx calls with something else
        and type(norm) in (nn.BatchNorm2d, BatchNormReLU)
        and norm.training
        and norm.affine
        and norm.running_mean is not None
        and norm.momentum is not None
        and not torch.compiler.is_compiling()
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks)
        and x.ndim == 4
        and x.dtype in _DTYPES
        and x.shape[1] == norm.num_features
        and x.device == norm.weight.device
        and x.numel() > x.shape[1]  # torch refuses a single value
        and x.is_contiguous(memory_format=torch.channels_last)
        and _obstacle(x.device) is None
    )


def _obstacle(device: torch.device) -> str | None:
    """Why there are no kernels on a device; None if there are."""
    launch = _launch()
    if launch is None:
        return "Triton is not installed; it comes with torch's builds for CUDA on Linux"
    if device.type != ("cpu" if launch.INTERPRETED else "cuda"):
        return f"the kernels need a CUDA device; the device is {device}"
    return None


class BatchNormReLU(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` followed by a ReLU, in one operation where the kernels apply.

    Parameters, buffers, state-dict keys and, after ``.eval()``, the arithmetic are those of
    ``torch.nn.BatchNorm2d``; the output is cut off at zero.

    Notes
    -----
    Tools that take a ``torch.nn.BatchNorm2d`` for a normalization and no more, such as
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, would lose the ReLU.
    :func:`~bnlib.population.fold_batch_norm` knows that it may not fold such a layer.
    :func:`fuse_norm_relu` avoids the question: it leaves the layers of a network what they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to one of the same shape, dtype and layout."""
        return norm_relu(input, self)


class _FusedConvNormAct(ConvNormAct):
    """The same three layers under the same names, called otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to (N, C', H', W')."""
        x = self.conv(x)
        if isinstance(self.norm, nn.BatchNorm2d) and isinstance(self.act, nn.ReLU):
            return norm_relu(x, self.norm, self.act)
        return self.act(self.norm(x))


def fuse_norm_relu(model: nn.Module, device: torch.device | str | None = None) -> int:
    """Let a network use the fused kernels, in place; its layers and state-dict keys stay.

    Parameters
    ----------
    model
        A :class:`~bnlib.inception.architecture.BNInception`, or a module made of its blocks.
    device
        Where it will be trained; None: where its parameters are.

    Returns
    -------
    int
        How many pairs of normalization and ReLU will be fused.

    Raises
    ------
    ValueError
        If there is no such pair, or the device has no kernels.

    Notes
    -----
    Inference, folding and population statistics work as before.  With ``recompute`` the stem's two
    large maps and the average-pooled projections stay with torch.
    """
    where = next(model.parameters()).device if device is None else torch.device(device)
    if (obstacle := _obstacle(where)) is not None:
        raise ValueError(f"normalization and ReLU cannot be fused here: {obstacle}")
    fused = 0
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if (
                type(block) is ConvNormAct
                and type(block.norm) is nn.BatchNorm2d
                and type(block.act) is nn.ReLU
            ):
                setattr(parent, name, _FusedConvNormAct(block.conv, block.norm, block.act))
                fused += 1
    if not fused:
        raise ValueError(
            f"the network ({type(model).__name__}) has no batch normalization with a ReLU behind "
            "it, so there is nothing to fuse; leave this out"
        )
    return fused
