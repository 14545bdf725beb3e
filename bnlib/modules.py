"""The batch-normalization layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.functional import batch_norm_inference, batch_norm_with_statistics

__all__ = ["BatchNorm", "PerActivationBatchNorm"]


class BatchNorm(_BatchNorm):
    """Batch normalization, a drop-in for ``torch.nn.BatchNorm1d``, ``2d`` and ``3d``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return batch_norm_inference(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
        y, mean, var = batch_norm_with_statistics(x, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None:
            self._track(mean, var, x.numel() // max(x.shape[1], 1))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, m: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight: Any = self.momentum
        if weight is None:
            weight = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_((var * (m / (m - 1))).to(self.running_var.dtype), weight)


class PerActivationBatchNorm(BatchNorm):
    """Batch normalization with one (gamma, beta) for every activation."""

    def __init__(self, feature_shape: int | Sequence[int], **options: Any) -> None:
        shape = (feature_shape,) if isinstance(feature_shape, int) else tuple(feature_shape)
        super().__init__(math.prod(shape), **options)
        self.feature_shape = shape
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            if tensor is not None and tensor.ndim == 1:
                value = tensor.detach().reshape(shape)
                if name in self._parameters:
                    self._parameters[name] = nn.Parameter(value)
                else:
                    self._buffers[name] = value

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)

        def line(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.reshape(-1)

        mean, var = line(self.running_mean), line(self.running_var)
        if not self.training and mean is not None and var is not None:
            y = batch_norm_inference(flat, mean, var, line(self.weight), line(self.bias), self.eps)
        else:
            y, mu, sigma2 = batch_norm_with_statistics(
                flat, line(self.weight), line(self.bias), self.eps
            )
            if self.training and mean is not None:
                self._track(
                    mu.view(self.feature_shape), sigma2.view(self.feature_shape), x.shape[0]
                )
        return y.reshape(x.shape)
