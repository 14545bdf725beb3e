"""The Inception module: a row of the table as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnlib.inception.layers import Convolutions, StridedMaxPool
from bnlib.inception.table import Row

__all__ = ["Inception"]


class Inception(nn.Module):
    """One Inception module: a row of the table.

    Up to four branches on the same input, concatenated along the channels: a 1x1 convolution; a 1x1
    then a 3x3; a 1x1 then two 3x3; a pooling, then a 1x1 projection.  In the modules with stride 2
    the 1x1 branch is missing and the pooled input passes through without a projection.
    """

    def __init__(self, row: Row, in_channels: int, conv: Convolutions) -> None:
        super().__init__()
        stride = row.stride
        self.conv1x1 = conv(in_channels, row.conv1x1, 1) if row.conv1x1 else None
        self.reduce3x3 = conv(in_channels, row.reduce3x3, 1)
        self.conv3x3 = conv(row.reduce3x3, row.conv3x3, 3, stride)
        self.reduce_double3x3 = conv(in_channels, row.reduce_double3x3, 1)
        self.double3x3_1 = conv(row.reduce_double3x3, row.double3x3, 3)
        self.double3x3_2 = conv(row.double3x3, row.double3x3, 3, stride)
        self.pool: nn.Module
        if stride == 2:
            self.pool = StridedMaxPool()
        elif row.pool == "avg":
            self.pool = nn.AvgPool2d(3, 1, 1)
        else:
            self.pool = nn.MaxPool2d(3, 1, 1)
        self.projection = conv(in_channels, row.projection, 1) if row.projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to (N, C', H', W')."""
        pooled = self.pool(x)
        branches = [
            self.conv3x3(self.reduce3x3(x)),
            self.double3x3_2(self.double3x3_1(self.reduce_double3x3(x))),
            pooled if self.projection is None else self.projection(pooled),
        ]
        if self.conv1x1 is not None:
            branches.insert(0, self.conv1x1(x))
        return torch.cat(branches, 1)
