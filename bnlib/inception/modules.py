"""The Inception module: a row of the table as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnlib.inception.layers import ACTIVATIONS, ConvNormAct, StridedMaxPool
from bnlib.inception.table import Row
from bnlib.modules import PerActivationBatchNorm

__all__ = ["Convolutions", "Inception"]


class Convolutions:
    """Makes the convolutions of one network, all in its own way."""

    def __init__(self, normalization: str, activation: str, bias: bool, eps: float) -> None:
        self.normalization, self.activation = normalization, activation
        self.bias, self.eps = bias, eps

    def norm(self, channels: int, size: tuple[int, int] | None) -> nn.Module:
        if self.normalization == "none":
            return nn.Identity()
        if self.normalization == "per-activation-last" and size is not None:
            return PerActivationBatchNorm((channels, *size), eps=self.eps)
        return nn.BatchNorm2d(channels, eps=self.eps)

    def wrap(
        self, conv: nn.Module, channels: int, size: tuple[int, int] | None = None
    ) -> ConvNormAct:
        return ConvNormAct(conv, self.norm(channels, size), ACTIVATIONS[self.activation]())

    def __call__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        size: tuple[int, int] | None = None,
    ) -> ConvNormAct:
        conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=self.bias)
        return self.wrap(conv, channels, size)


class Inception(nn.Module):
    """One Inception module: a row of the table.

    Up to four branches on the same input, concatenated along the channels: a 1x1 convolution; a 1x1
    then a 3x3; a 1x1 then two 3x3; a pooling, then a 1x1 projection.  In the modules with stride 2
    the 1x1 branch is missing and the pooled input passes through without a projection.
    """

    def __init__(
        self, row: Row, in_channels: int, conv: Convolutions, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        stride = row.stride
        self.conv1x1 = conv(in_channels, row.conv1x1, 1, size=size) if row.conv1x1 else None
        self.reduce3x3 = conv(in_channels, row.reduce3x3, 1, size=size)
        self.conv3x3 = conv(row.reduce3x3, row.conv3x3, 3, stride, size=size)
        self.reduce_double3x3 = conv(in_channels, row.reduce_double3x3, 1, size=size)
        self.double3x3_1 = conv(row.reduce_double3x3, row.double3x3, 3, size=size)
        self.double3x3_2 = conv(row.double3x3, row.double3x3, 3, stride, size=size)
        self.pool: nn.Module
        if stride == 2:
            self.pool = StridedMaxPool()
        elif row.pool == "avg":
            self.pool = nn.AvgPool2d(3, 1, 1)
        else:
            self.pool = nn.MaxPool2d(3, 1, 1)
        self.projection = (
            conv(in_channels, row.projection, 1, size=size) if row.projection else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to (N, C', H', W')."""
        branches = [
            self.conv3x3(self.reduce3x3(x)),
            self.double3x3_2(self.double3x3_1(self.reduce_double3x3(x))),
        ]
        if self.conv1x1 is not None:
            branches.insert(0, self.conv1x1(x))
        if self.projection is None:
            pooled = self.pool(x)
        else:
            pooled = self.projection(self.pool(x))
        branches.append(pooled)
        return torch.cat(branches, 1)
