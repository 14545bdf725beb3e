"""The layers of BN-Inception: convolutions, pooling, the Inception module, the input's check."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnlib.inception.table import Row
from bnlib.modules import PerActivationBatchNorm

__all__ = ["Convolutions", "ImageInput", "Inception", "LocalResponseNorm", "StridedMaxPool"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Convolutions:
    """Makes the convolutions of one network, with the normalization and activation they share.

    Each is z = g(BN(W u)), section 3.2's order: the layers ``conv``, ``norm`` and ``act``.
    """

    normalized: bool
    activation: str
    bias: bool
    eps: float
    per_activation: tuple[int, int] | None = None  # map size, if each activation has its own norm

    def __call__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, multiplier: int = 0
    ) -> nn.Sequential:
        """A convolution that keeps the map size, or with stride 2 halves it, rounded up.

        With a ``multiplier`` it is separable: a depthwise convolution with that many maps for each
        input channel, then a 1x1.
        """
        padding = kernel // 2
        conv: nn.Module
        if multiplier:
            between = in_channels * multiplier
            conv = nn.Sequential(
                nn.Conv2d(
                    in_channels, between, kernel, stride, padding, groups=in_channels, bias=False
                ),
                nn.Conv2d(between, channels, 1, bias=self.bias),
            )
        else:
            conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=self.bias)
        norm: nn.Module = nn.Identity()
        if self.normalized and self.per_activation:
            norm = PerActivationBatchNorm((channels, *self.per_activation), eps=self.eps)
        elif self.normalized:
            norm = nn.BatchNorm2d(channels, eps=self.eps)
        act = ACTIVATIONS[self.activation]()
        return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=act))


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's layer on images, with the sum over neighboring channels as additions.

    torch pools over the channels, which on a CPU takes about three times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to the same shape."""
        channels, before = x.shape[1], self.size // 2
        squares = F.pad(x * x, (0, 0, 0, 0, before, self.size - 1 - before))
        total = squares[:, :channels]
        for first in range(1, self.size):
            total = total + squares[:, first : first + channels]
        return x * (self.k + self.alpha / self.size * total) ** -self.beta


class StridedMaxPool(nn.Module):
    """Max pooling 3x3 with stride 2 whose windows start at 0, 2, 4, ...: n becomes ceil(n / 2).

    On maps of even size this is ``MaxPool2d(3, 2, ceil_mode=True)``, the pass-through branch of the
    published ports.  On maps of odd size that layer gives one row and column less than the 3x3
    convolutions beside it; here the last window starts at the last pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, C, H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
        height, width = x.shape[2], x.shape[3]
        if height % 2 == 1 or width % 2 == 1:
            x = F.pad(x, (0, width % 2, 0, height % 2), value=float("-inf"))
        return F.max_pool2d(x, 3, 2, ceil_mode=True)


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


class ImageInput(nn.Module):
    """Returns its input, after checking that it is a mini-batch of images the network can take."""

    def __init__(self, channels: int, smallest: int) -> None:
        super().__init__()
        self.channels = channels
        self.smallest = smallest

    def forward(self, x: Tensor) -> Tensor:
        """The tensor itself, or an error that states the fault and the remedy."""
        shape = list(x.shape)
        if len(shape) != 4:
            raise ValueError(
                f"images of shape {shape}; the network takes (N, {self.channels}, H, W). "
                "Add a batch axis with images[None]"
            )
        if shape[1] != self.channels:
            raise ValueError(
                f"images of shape {shape} have {shape[1]} channels on axis 1; this network was "
                f"made for {self.channels} (in_chans). Axes are (N, channels, height, width)"
            )
        if min(shape[2], shape[3]) < self.smallest:
            raise ValueError(
                f"images of shape {shape}: height and width must be at least {self.smallest}. "
                "Enlarge them first"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"images of dtype {x.dtype}; the network takes floating-point images, normalized "
                "as its weights expect"
            )
        return x

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        return f"channels={self.channels}, smallest={self.smallest}"
