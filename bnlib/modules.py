"""The batch-normalization layers: :mod:`bnlib.functional` with parameters, running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib._core.channels import check_eps, check_input, count
from bnlib.functional import batch_norm, batch_norm_inference, batch_norm_with_statistics

__all__ = ["BatchNorm", "GhostBatchNorm", "PerActivationBatchNorm"]


class BatchNorm(_BatchNorm):
    """Batch normalization (Algorithm 1, section 3.2): one (gamma, beta) for each channel.

    A drop-in for ``torch.nn.BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d``: the same outputs,
    gradients, running statistics and state dict (``weight`` is gamma, ``bias`` is beta,
    ``running_mean``, ``running_var``, ``num_batches_tracked``), so that checkpoints load either
    way.  It is a subclass of their common base class, so that tools which look for
    batch-normalization layers find it.

    In training the layer normalizes with the statistics of the mini-batch and moves its running
    statistics towards them; after ``.eval()`` it normalizes with the running statistics, which
    :func:`~bnlib.population.population_statistics` can replace by those of Algorithm 2.  Which of
    the two happens depends on the layer's own ``training`` flag, never on whether gradients are
    enabled.

    Parameters
    ----------
    num_features
        Number of channels C: the size of axis 1 of the input.
    eps
        The constant added to the variance; positive.
    momentum
        Weight, from 0 to 1, of the *new* value in the running statistics (a decay of 0.9 in other
        libraries is a momentum of 0.1 here).  None makes them the average of all mini-batches so
        far, each with the same weight.
    affine
        Whether there are gamma and beta; without them they stand at 1 and 0.
    track_running_stats
        Whether there are running statistics; without them mini-batch statistics serve in
        evaluation too.
    device, dtype
        Of the parameters and running statistics, as in every layer of ``torch.nn``.

    Raises
    ------
    ValueError
        If ``num_features`` is negative, ``eps`` is not positive and finite, or ``momentum`` is not
        between 0 and 1.

    Notes
    -----
    The *biased* variance normalizes; the unbiased one, times m / (m - 1), enters ``running_var``.
    An empty mini-batch leaves the running statistics as they are.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 0:
            raise ValueError(f"num_features is {num_features}; it must not be negative")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum is {momentum}; it must be between 0 and 1 (it weighs the new value), or "
                "None for the plain average of all mini-batches"
            )
        check_eps(eps)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a mini-batch, of any shape that :func:`~bnlib.functional.batch_norm` takes.

        Raises
        ------
        ValueError, TypeError
            If ``x`` does not have ``num_features`` channels, and as ``batch_norm`` does.
        """
        check_input(x)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"x of shape {tuple(x.shape)} has {x.shape[1]} channels on axis 1, but this layer "
                f"was made for num_features={self.num_features}"
            )
        return self._transform(x, self.weight, self.bias, self.running_mean, self.running_var)

    def _transform(self, x: Tensor, *vectors: Tensor | None) -> Tensor:
        """Normalize with vectors of shape (C,), and move the running ``mean`` and ``var``."""
        gamma, beta, mean, var = vectors
        if not self.training and mean is not None and var is not None:
            return batch_norm_inference(x, mean, var, gamma, beta, self.eps)
        y, batch_mean, batch_var = batch_norm_with_statistics(x, gamma, beta, self.eps)
        m = count(x)
        tracks = self.training and self.track_running_stats and m > 0
        if tracks and mean is not None and var is not None:
            weight: float | Tensor = self.momentum or 0.0
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:  # kept as a tensor: reading it would make a GPU wait
                    weight = self.num_batches_tracked.to(mean.dtype).reciprocal()
            mean.lerp_(batch_mean.to(mean.dtype), weight)
            var.lerp_((batch_var * (m / (m - 1))).to(var.dtype), weight)
        return y


class PerActivationBatchNorm(BatchNorm):
    """Batch normalization with one (gamma, beta) for each activation, pixels included.

    Statistics go over the batch axis only: section 3 of the paper before section 3.2 makes it
    convolutional.  Section 4.2.3 uses it in the last hidden layers of some networks of the
    ensemble.  Parameters and running statistics have the shape of one example.

    Parameters
    ----------
    feature_shape
        Shape of one example: of the input without its batch axis.
    eps, momentum, affine, track_running_stats, device, dtype
        As in :class:`BatchNorm`.

    Raises
    ------
    ValueError
        If ``feature_shape`` is empty or has a negative size, and as :class:`BatchNorm` does.
    """

    def __init__(
        self,
        feature_shape: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (feature_shape,) if isinstance(feature_shape, int) else tuple(feature_shape)
        if not shape or min(shape) < 0:
            raise ValueError(
                f"feature_shape is {feature_shape}; it must be the shape of one example, with at "
                "least one axis and no negative size"
            )
        super().__init__(
            math.prod(shape), eps, momentum, affine, track_running_stats, device, dtype
        )
        self.feature_shape = shape
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor is not None:
                tensor.data = tensor.data.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a mini-batch of shape ``(N, *feature_shape)``; as :meth:`BatchNorm.forward`."""
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.feature_shape:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x is {given}, but this layer was made for feature_shape={self.feature_shape}: "
                f"x must be a tensor of shape (N, {', '.join(map(str, self.feature_shape))})"
            )
        vectors = (
            None if t is None else t.view(-1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        return self._transform(x.flatten(1), *vectors).view(x.shape)

    def extra_repr(self) -> str:
        _, options = super().extra_repr().split(", ", 1)
        return f"{self.feature_shape}, {options}"


class GhostBatchNorm(BatchNorm):
    """Batch normalization of ghost batches: each part of the mini-batch has its own statistics.

    The name is from Hoffer et al. (2017), who divide very large mini-batches in this way.  It is
    also what happens when many processes train one network together, each with its share of the
    mini-batch.  The running statistics are those of whole mini-batches, and inference is that of
    :class:`BatchNorm`.

    Parameters
    ----------
    num_features
        Number of channels C.
    size
        Examples of a part, 2 or more: the first ``size`` examples are one, the next ones another.
    eps, momentum
        As in :class:`BatchNorm`.

    Raises
    ------
    ValueError
        If ``size`` is less than 2, and as :class:`BatchNorm` does.
    """

    def __init__(
        self, num_features: int, size: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        if size < 2:
            raise ValueError(f"size is {size}; a part needs 2 examples or more to have a variance")
        self.size = size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each part of a mini-batch, a multiple of ``size``, by itself."""
        if not self.training or len(x) == self.size:
            return super().forward(x)
        if len(x) % self.size:
            raise ValueError(
                f"a mini-batch of {len(x)} examples cannot be cut into parts of {self.size}; take "
                f"a multiple of {self.size} examples, or another size"
            )
        with torch.no_grad():
            super().forward(x)  # for the running statistics
        # (size, parts, C, ...): each part's channels become channels of their own
        parts = x.unflatten(0, (-1, self.size)).transpose(0, 1)
        gamma, beta = (p.repeat(parts.shape[1]) for p in (self.weight, self.bias))
        y = batch_norm(parts.flatten(1, 2), gamma, beta, self.eps)
        return y.view_as(parts).transpose(0, 1).reshape(x.shape)
