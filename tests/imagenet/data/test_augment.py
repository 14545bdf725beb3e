"""Crops, flips and distortions: GoogLeNet's and torchvision's, drawn by (seed, epoch, index)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from image_sets import SMALL, reference
from images import encoded, synthetic
from PIL import Image
from torch import Tensor

from bnlib.imagenet.data import augment
from bnlib.imagenet.data.order import generator


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (96, 96), (33, 40)])
def test_crops_lie_inside_with_googlenets_areas_and_aspect_ratios(size: tuple[int, int]) -> None:
    width, height = size
    rng = generator(0, 2)
    boxes = [augment.training_crop(width, height, rng) for _ in range(2000)]
    areas = np.array([box.width * box.height / (width * height) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    slack = 1.5 / min(boxes[int(areas.argmin())][2:])
    assert all(0 <= box.left <= width - box.width for box in boxes)
    assert all(0 <= box.top <= height - box.height for box in boxes)
    assert 0.08 * (1 - 2 * slack) < areas.min() < 0.12
    assert areas.max() > 0.9
    assert 0.75 * (1 - slack) < ratios.min() < 0.78
    assert 1.28 < ratios.max() < 4 / 3 * (1 + slack)
    lefts = np.array([b.left / (width - b.width) for b in boxes if b.width < width - 8])
    assert abs(lefts.mean() - 0.5) < 0.05, "the place is uniform"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (0, 0, 1, 1)), ((5000, 3), (2498, 0, 4, 3)), ((3, 5000), (0, 2498, 3, 4))],
)
def test_an_image_that_no_crop_fits_gives_its_middle(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    rng = generator(0, 2)
    boxes = {augment.training_crop(*size, rng, min_area=0.9) for _ in range(20)}
    assert expected in boxes
    assert all(box.width >= 1 and box.height >= 1 for box in boxes)


def test_an_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    def drawn(seed: int = 1, epoch: int = 2, index: int = 3) -> augment.Augmentation:
        return augment.draw(500, 375, SMALL.replace(seed=seed), epoch=epoch, index=index)

    assert drawn() == drawn()
    assert len({drawn(), drawn(seed=2), drawn(epoch=3), drawn(index=4), drawn(3, 2, 1)}) == 5


def test_flips_orders_and_factors_are_drawn_evenly_and_reduced_strength_halves_them() -> None:
    full, half, none = (
        [augment.draw(50, 50, recipe, epoch=0, index=i) for i in range(3000)]
        for recipe in (SMALL.replace(photometric=strength) for strength in (1.0, 0.5, 0.0))
    )
    assert 0.45 < np.mean([each.flip for each in full]) < 0.55
    orders = [each.order for each in full]
    assert all(400 < orders.count(p) < 600 for p in itertools.permutations(range(3)))  # type: ignore[arg-type]
    factors = np.array([each.factors for each in full])
    assert np.allclose(factors.min(0), 0.5, atol=0.01)
    assert np.allclose(factors.max(0), 1.5, atol=0.01)
    reduced = np.array([each.factors for each in half])
    np.testing.assert_allclose(reduced - 1, (factors - 1) / 2)
    assert {each.factors for each in none} == {(1.0, 1.0, 1.0)}
    assert [each.box for each in full] == [each.box for each in none]


def distorted(image: Image.Image, order: tuple[int, ...], factors: tuple[float, ...]) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return augment.distort(pixels, torch.tensor([order]), torch.tensor([factors]))[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_distortions_are_those_of_torchvision_in_their_order(order: tuple[int, ...]) -> None:
    from torchvision.transforms.v2 import functional

    factors = (0.9, 0.7, 1.2)
    image = synthetic(1).point(lambda value: 60 + value // 2)  # nothing leaves 0..255
    kinds = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    theirs = reference(encoded(image, "PNG")).float() / 255
    for kind in order:
        theirs = kinds[kind](theirs, factors[kind])
    assert (distorted(image, order, factors) - theirs * 255).abs().max() < 0.1


def test_factors_of_one_distort_nothing_and_values_stay_in_range() -> None:
    image = synthetic(2)
    same = distorted(image, (2, 0, 1), (1, 1, 1))
    torch.testing.assert_close(same, reference(encoded(image, "PNG")).float(), atol=1e-3, rtol=0)
    extreme = distorted(image, (0, 1, 2), (1.5, 1.5, 1.5))
    assert (extreme.min(), extreme.max()) == (0, 255)


def test_normalization_is_that_of_torchvision() -> None:
    from torchvision.transforms import v2

    pixels = torch.rand(2, 3, 5, 5)
    expected = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels)
    torch.testing.assert_close(augment.normalize(pixels * 255), expected, atol=1e-5, rtol=1e-5)
