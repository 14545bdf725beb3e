"""Which parts of an image a network looks at: the middle, ten, or GoogLeNet's 144.

The 144 (Szegedy et al., 2015, section 7; the paper uses them in section 4.2.3): the shorter side is
resized to 256, 288, 320 and 352 pixels; of each, the left, middle and right square is taken (top,
middle and bottom of an upright image); of each square, the four corners and the middle at
224 x 224 and the whole square resized to 224 x 224; and each of these also mirrored: 4 x 3 x 6 x 2.

For another crop size the four sizes keep their proportion to it: 8, 9, 10 and 11 sevenths.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bnlib.imagenet.data.decode import resize

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


def _five(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """Left and top of the four corner crops and the middle one."""
    right, low = width - size, height - size
    return [(0, 0), (right, 0), (0, low), (right, low), (round(right / 2), round(low / 2))]


def views(width: int, height: int, size: int, crops: int) -> list[View]:
    """The crops of an image, in a fixed order.

    With 1, the middle of the image whose shorter side is 8/7 of ``size``; with 10, its four corners
    too, and their mirror images; with 144, GoogLeNet's. Another number is a ``ValueError``.
    """
    if crops not in CROPS:
        raise ValueError(f"crops is {crops}; it must be one of {CROPS}")
    if crops < 144:
        shorter = round(size * 8 / 7)
        places = _five(*_resized(width, height, shorter), size)
        if crops == 1:
            return [View(shorter, *places[-1], size, False)]
        return [View(shorter, *at, size, mirrored) for at in places for mirrored in (False, True)]
    found = []
    for sevenths in (8, 9, 10, 11):
        shorter = round(size * sevenths / 7)
        wide, high = _resized(width, height, shorter)
        for step in (0, 0.5, 1):
            left, top = round((wide - shorter) * step), round((high - shorter) * step)
            inside = [(left + x, top + y, size) for x, y in _five(shorter, shorter, size)]
            for view in (*inside, (left, top, shorter)):
                found += [View(shorter, *view, mirrored) for mirrored in (False, True)]
    return found


def cropped(image: Tensor, size: int, crops: int) -> list[Tensor]:
    """The :func:`views` of an image, uint8 (3, H, W), as images, uint8 (3, size, size).

    A crop that occurs more than once, as GoogLeNet's three squares of an image that is itself
    square, is one tensor at several places of the list.
    """
    height, width = image.shape[1:]
    resized: dict[int, Tensor] = {}
    found: dict[View, Tensor] = {}
    order = views(width, height, size, crops)
    for view in dict.fromkeys(order):
        if view.shorter not in resized:
            wide, high = _resized(width, height, view.shorter)
            resized[view.shorter] = resize(image, high, wide)
        rows = slice(view.top, view.top + view.side)
        columns = slice(view.left, view.left + view.side)
        part = resize(resized[view.shorter][:, rows, columns], size, size)
        found[view] = part.flip(-1) if view.mirrored else part
    return [found[view] for view in order]
