"""The Inception module, a row of the table as a layer, and the auxiliary classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnlib.inception.layers import ACTIVATIONS, ConvNormAct, StridedMaxPool
from bnlib.inception.table import Row
from bnlib.modules import PerActivationBatchNorm

__all__ = ["AuxiliaryHead", "Convolutions", "Inception"]


class Convolutions:
    """Makes the convolutions of one network, all in its own way."""

    def __init__(
        self, normalization: str, activation: str, bias: bool, eps: float, recompute: bool
    ) -> None:
        self.normalization, self.activation = normalization, activation
        self.bias, self.eps = bias, eps
        self.pool_last = recompute and not bias

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
        self.pool_last = conv.pool_last and row.pool == "avg"
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
        elif self.pool_last and self.training:  # both are linear: the order is free
            pooled = self.pool(self.projection.conv(x))
            pooled = self.projection.act(self.projection.norm(pooled))
        else:
            pooled = self.projection(self.pool(x))
        branches.append(pooled)
        return torch.cat(branches, 1)


class AuxiliaryHead(nn.Sequential):
    """A second classifier halfway up, for training: pool 5x5 stride 3, 1x1 to 128, 768, classes.

    A reconstruction: the paper does not say whether there was one.
    """

    def __init__(self, channels: int, map_size: tuple[int, int], num_classes: int) -> None:
        self.pooled_size = [(n - 5) // 3 + 1 for n in map_size]
        height, width = self.pooled_size
        super().__init__(
            nn.AvgPool2d(5, 3),
            nn.Conv2d(channels, 128, 1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(128 * height * width, 768),
            nn.ReLU(inplace=True),
            nn.Linear(768, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to (N, num_classes)."""
        found = [(n - 5) // 3 + 1 for n in x.shape[2:]]
        if found != self.pooled_size:
            raise ValueError(
                f"the auxiliary head pools these images to {found}, but was made for "
                f"{self.pooled_size}: make the network with image_size=(height, width) of the "
                "images, or give it images of the size it was made for"
            )
        for layer in self:
            x = layer(x)
        return x
