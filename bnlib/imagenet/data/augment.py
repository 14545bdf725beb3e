"""Training crops, flips and photometric distortions: functions of (seed, epoch, index).

The crops are GoogLeNet's: 8 to 100% of the image's area, aspect ratio from 3/4 to 4/3. The
photometric distortions are Howard's (2013): brightness, contrast and color, each multiplied by a
factor from 0.5 to 1.5 at full strength, in a random order. The paper reduces them with batch
normalization and does not say by how much (section 4.2.1).

Each distortion is affine in the pixels, so that the three together are one 3x3 matrix and one shift
per image. They are applied to a whole mini-batch at once, where the network is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnlib.imagenet.data.order import AUGMENTATION, generator
from bnlib.imagenet.recipes import Recipe

__all__ = ["Augmentation", "Box", "distort", "draw", "normalize", "training_crop"]

# The mean and deviation of ImageNet's training pixels that torchvision's and most other published
# weights use: RGB, intensities from 0 to 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601: the gray value of an RGB pixel
BRIGHTNESS, CONTRAST, COLOR = range(3)
ATTEMPTS = 10


class Box(NamedTuple):
    """A rectangle in an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Augmentation(NamedTuple):
    """What is done to one image."""

    box: Box
    flip: bool
    order: tuple[int, int, int]  # of brightness (0), contrast (1) and color (2)
    factors: tuple[float, float, float]  # of the three; 1 leaves the image as it is


def training_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    min_area: float = 0.08,
    max_aspect: float = 4 / 3,
) -> Box:
    """GoogLeNet's random crop of an image of that size: inside it, at least one pixel.

    The area is uniform between ``min_area`` and 1 of the image's, the logarithm of the aspect
    ratio uniform between those of 1 / ``max_aspect`` and ``max_aspect`` (GoogLeNet names the
    limits, not the distributions), the place uniform among those that fit. If ten such draws do not
    fit into the image, the crop is its middle: all of it if its own aspect ratio is allowed,
    else the largest part with the nearest allowed one.
    """
    for area, aspect, x, y in rng.random((ATTEMPTS, 4)).tolist():
        pixels = (min_area + area * (1 - min_area)) * width * height
        ratio = max_aspect ** (2 * aspect - 1)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h)
    w = min(width, max(1, round(height * max_aspect)))
    h = min(height, max(1, round(width * max_aspect)))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def draw(width: int, height: int, recipe: Recipe, *, epoch: int, index: int) -> Augmentation:
    """The augmentation in an epoch of the example with that index, an image of that size."""
    rng = generator(recipe.seed, AUGMENTATION, epoch, index)
    mirrored, *shuffled = rng.random(4).tolist()
    factors = (1 + recipe.photometric * (rng.random(3) - 0.5)).tolist()
    first, second, third = sorted(range(3), key=shuffled.__getitem__)
    box = training_crop(width, height, rng, min_area=recipe.min_area, max_aspect=recipe.max_aspect)
    brightness, contrast, color = factors
    return Augmentation(box, mirrored < 0.5, (first, second, third), (brightness, contrast, color))


def distort(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Photometric distortions of a mini-batch, each image by its own.

    Brightness multiplies. Contrast moves every value away from the image's mean gray, color
    every pixel away from its own gray value. What leaves 0 to 255 is cut off, once, at the end.
    ``images``, float32 (N, 3, H, W), RGB from 0 to 255, are overwritten and returned; ``order``,
    int64 (N, 3), and ``factors``, float32 (N, 3), are those of :class:`Augmentation`.
    """
    flat = images.flatten(2)
    mean = flat.mean(2, keepdim=True)
    gray = _constant(LUMINANCE, images.device)[None]
    to_gray = gray.expand(3, 3)
    matrix = torch.eye(3, device=images.device).expand(len(images), 3, 3)
    shift = torch.zeros_like(mean)
    for kind in order.unbind(1):
        factor = factors.gather(1, kind[:, None])[:, :, None]
        kind = kind[:, None, None]
        mean_gray = gray @ (matrix @ mean + shift)
        step = factor * torch.eye(3, device=images.device)
        step = step + torch.where(kind == COLOR, 1 - factor, 0.0) * to_gray
        offset = torch.where(kind == CONTRAST, (1 - factor) * mean_gray, 0.0)
        matrix, shift = step @ matrix, step @ shift + offset
    distorted = torch.baddbmm(shift, matrix, flat)
    return distorted.clamp_(0, 255).view_as(images)


def normalize(images: Tensor) -> Tensor:
    """(x / 255 - mean) / std per channel, in place: float32 (N, 3, H, W), RGB from 0 to 255."""
    mean = _constant(MEAN, images.device).view(3, 1, 1) * 255
    std = _constant(STD, images.device).view(3, 1, 1) * 255
    return images.sub_(mean).div_(std)


@cache  # or each step would wait until a GPU has finished the one before, to copy three numbers
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
