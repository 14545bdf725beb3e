"""One crop, ten and GoogLeNet's 144: where they lie, drawn out in pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnlib.imagenet.evaluation.crops import View, cropped, views

SIZES = [(500, 375), (375, 500), (341, 1000), (256, 256), (64, 64), (97, 41)]


def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    least = min(width, height)
    return width * shorter // least, height * shorter // least


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [32, 224, 299])
@pytest.mark.parametrize("crops", [1, 10, 144])
def test_every_crop_lies_inside_the_image(width: int, height: int, size: int, crops: int) -> None:
    found = views(width, height, size, crops)
    assert len(found) == crops
    for view in found:
        wide, high = resized(width, height, view.shorter)
        assert min(wide, high) == view.shorter
        assert view.side >= size
        assert 0 <= view.left <= wide - view.side
        assert 0 <= view.top <= high - view.side


@pytest.mark.parametrize("upright", [False, True])
def test_the_144_are_googlenets_four_sizes_three_squares_six_crops_and_mirror_images(
    upright: bool,
) -> None:
    found = views(*((375, 500) if upright else (500, 375)), 224, 144)
    assert len(set(found)) == 144, "all are different"
    expected = set()
    for shorter, longer in ((256, 341), (288, 384), (320, 426), (352, 469)):
        for start in (0, (longer - shorter) / 2, longer - shorter):
            start = round(start)  # left, middle, right; or top, middle, bottom
            square = (0, start) if upright else (start, 0)
            far, middle = shorter - 224, (shorter - 224) // 2
            inside = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
            boxes = [(square[0] + x, square[1] + y, 224) for x, y in inside]
            boxes.append((*square, shorter))
            expected |= {
                View(shorter, *box, mirrored) for box in boxes for mirrored in (False, True)
            }
    assert set(found) == expected


def test_another_crop_size_keeps_the_proportions() -> None:
    assert {view.shorter for view in views(500, 375, 112, 144)} == {128, 144, 160, 176}


def test_the_ten_are_the_corners_and_the_middle_and_their_mirror_images() -> None:
    found = views(500, 375, 224, 10)
    wide, high = 341, 256
    places = {(0, 0), (wide - 224, 0), (0, high - 224), (wide - 224, high - 224), (58, 16)}
    assert {(v.left, v.top) for v in found} == places
    assert set(found) == {
        View(256, *place, 224, mirrored) for place in places for mirrored in (False, True)
    }


def test_one_crop_is_the_middle() -> None:
    assert views(500, 375, 224, 1) == [View(256, 58, 16, 224, False)]
    assert views(375, 500, 224, 1) == [View(256, 16, 58, 224, False)]


def test_another_number_of_crops_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crops is 12; it must be one of \(1, 10, 144\)"):
        views(500, 375, 224, 12)


def ramps(width: int, height: int) -> Tensor:
    """An image in which red says how far right a pixel is, and green how far down; 0 to 255."""
    right = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return torch.stack([right, down, torch.full((height, width), 128.0)]).round().to(torch.uint8)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500)])
@pytest.mark.parametrize("crops", [1, 10, 144])
def test_drawn_out_every_crop_shows_the_part_of_the_image_that_it_should(
    width: int, height: int, crops: int
) -> None:
    size = 64
    parts = cropped(ramps(width, height), size, crops)
    assert len(parts) == crops
    for view, part in zip(views(width, height, size, crops), parts, strict=True):
        assert part.shape == (3, size, size)
        assert part.dtype == torch.uint8
        wide, high = resized(width, height, view.shorter)
        across = (torch.arange(size) + 0.5) * view.side / size
        columns = (view.left + across) / wide  # 0 to 1 over the image
        if view.mirrored:
            columns = columns.flip(0)
        lines = (view.top + across) / high
        red, green = part[0].float(), part[1].float()
        assert (red - 255 * columns).abs().max() <= 2.5, view
        assert (green - 255 * lines[:, None]).abs().max() <= 2.5, view
        assert (part[2] == 128).all()


def test_drawn_out_the_144_cover_the_image_and_the_middle_most() -> None:
    width, height = 400, 300
    seen = torch.zeros(height, width)
    for view in views(width, height, 224, 144):
        scale = min(width, height) / view.shorter
        left, top = math.floor(view.left * scale), math.floor(view.top * scale)
        side = math.ceil(view.side * scale)
        seen[top : top + side, left : left + side] += 1
    assert (seen > 0).all()
    assert seen[height // 2, width // 2] > 0.9 * seen.max()
    assert seen[0, 0] < seen.max() / 3
    torch.testing.assert_close(seen, seen.flip(1), atol=24, rtol=0)


def test_the_three_squares_of_a_square_image_are_one_and_computed_once() -> None:
    """GoogLeNet's 144 crops are then 48, three times each."""
    for width, height, different in ((64, 64, 48), (66, 64, 96), (375, 500, 144)):
        assert len(set(views(width, height, 32, 144))) == different
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    parts = cropped(pixels, 32, 144)
    assert len(parts) == 144
    assert len({id(part) for part in parts}) == 48
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 48
