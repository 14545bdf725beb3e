"""Which parts of an image a network looks at: the middle, ten, or GoogLeNet's 144.

The 144 (Szegedy et al., 2015, section 7; the paper uses them in section 4.2.3): the shorter side is
resized to 256, 288, 320 and 352 pixels; of each, the left, middle and right square is taken (top,
middle and bottom of an upright image); of each square, the four corners and the middle at
224 x 224 and the whole square resized to 224 x 224; and each of these also mirrored: 4 x 3 x 6 x 2.

For another crop size the four sizes keep their proportion to it: 8, 9, 10 and 11 sevenths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CROPS", "View", "cropped", "views"]

#: The numbers of crops that there are.
CROPS = (1, 10, 144)


class View(NamedTuple):
    """One crop: resize the shorter side, cut a square, resize it to the crop size, maybe mirror."""

    shorter: int
    left: int
    top: int
    side: int
    mirrored: bool


def _resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    least = min(width, height)
    return width * shorter // least, height * shorter // least


def _five(size: int, side: int) -> list[tuple[int, int]]:
    """Corners (left, top) of the four corner crops and the middle one in a square."""
    far, middle = side - size, round((side - size) / 2)
    return [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]


def views(width: int, height: int, size: int, crops: int) -> list[View]:
    """The crops of an image, in a fixed order.

    Parameters
    ----------
    width, height
        Of the image, pixels.
    size
        Height and width of a crop, pixels.
    crops
        1: the middle, with the shorter side 8/7 of ``size``.  10: there, the four corners and the
        middle of the image, and their mirror images.  144: GoogLeNet's.

    Raises
    ------
    ValueError
        If there is no such number of crops.
    """
    if crops not in CROPS:
        raise ValueError(f"crops is {crops}; it must be one of {CROPS}")
    if crops < 144:
        shorter = round(size * 8 / 7)
        wide, high = _resized(width, height, shorter)
        middle = round((wide - size) / 2), round((high - size) / 2)
        if crops == 1:
            return [View(shorter, *middle, size, False)]
        far = wide - size, high - size
        corners = [(0, 0), (far[0], 0), (0, far[1]), far, middle]
        return [View(shorter, *at, size, mirrored) for at in corners for mirrored in (False, True)]
    found = []
    for sevenths in (8, 9, 10, 11):
        shorter = round(size * sevenths / 7)
        wide, high = _resized(width, height, shorter)
        for step in (0, 0.5, 1):
            left, top = round((wide - shorter) * step), round((high - shorter) * step)
            inside = [(left + x, top + y, size) for x, y in _five(size, shorter)]
            for view in (*inside, (left, top, shorter)):
                found += [View(shorter, *view, mirrored) for mirrored in (False, True)]
    return found


def cropped(image: Tensor, size: int, crops: int) -> list[Tensor]:
    """The crops as images.

    Parameters
    ----------
    image
        uint8 (3, H, W).
    size, crops
        As in :func:`views`.

    Returns
    -------
    list of torch.Tensor
        uint8 (3, size, size) each. A crop that occurs more than once, as GoogLeNet's three squares
        of an image that is itself square, is one tensor at several places of the list.
    """
    height, width = image.shape[1:]
    resized: dict[int, Tensor] = {}
    found: dict[View, Tensor] = {}
    order = views(width, height, size, crops)
    for view in dict.fromkeys(order):
        if view.shorter not in resized:
            wide, high = _resized(width, height, view.shorter)
            resized[view.shorter] = _resize(image, high, wide)
        part = resized[view.shorter][:, view.top : view.top + view.side][
            :, :, view.left : view.left + view.side
        ]
        if view.side != size:
            part = _resize(part, size, size)
        found[view] = part.flip(-1) if view.mirrored else part
    return [found[view] for view in order]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return torch.nn.functional.interpolate(
        image[None].contiguous(memory_format=torch.channels_last),
        (height, width),
        mode="bilinear",
        antialias=True,
    )[0]
