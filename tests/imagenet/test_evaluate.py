"""GoogLeNet's 144 crops drawn out, accuracies with their intervals, ensembles."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from imagenet_runs import QUIET, TINY, TinyNetwork
from images import encoded, synthetic, write_folder
from torch import Tensor, nn

from bnlib.imagenet import checkpoint
from bnlib.imagenet.checkpoint import CheckpointError
from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import decode
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.evaluation.accuracy import (
    Accuracy,
    count_right,
    ensemble,
    load_network,
    probabilities,
    score,
)
from bnlib.imagenet.evaluation.crops import View, cropped, views
from bnlib.imagenet.evaluation.held_out import evaluation_batches
from bnlib.imagenet.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny")
PHOTOGRAPHS = [(500, 375), (375, 500), (341, 1000), (256, 256), (64, 64), (97, 41)]


def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    least = min(width, height)
    return width * shorter // least, height * shorter // least


# Geometry


@pytest.mark.parametrize(("width", "height"), PHOTOGRAPHS)
@pytest.mark.parametrize("size", [32, 224, 299])
@pytest.mark.parametrize("crops", [1, 10, 144])
def test_every_crop_lies_inside_the_photograph(
    width: int, height: int, size: int, crops: int
) -> None:
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
def test_drawn_out_every_crop_shows_the_part_of_the_photograph_that_it_should(
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
        columns = (view.left + across) / wide  # 0 to 1 over the photograph
        if view.mirrored:
            columns = columns.flip(0)
        lines = (view.top + across) / high
        red, green = part[0].float(), part[1].float()
        assert (red - 255 * columns).abs().max() <= 2.5, view
        assert (green - 255 * lines[:, None]).abs().max() <= 2.5, view
        assert (part[2] == 128).all()


def test_drawn_out_the_144_cover_the_photograph_and_the_middle_most() -> None:
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


def test_the_one_crop_is_the_one_that_evaluation_while_training_takes(data: Path) -> None:
    source = open_source(data, "val")
    ((images, labels),) = evaluation_batches(source, 32, 37, batch_size=100)
    assert len(images) == len(source) == 12
    for index, (theirs, label) in enumerate(zip(images, labels, strict=True)):
        example = source[index]
        (ours,) = cropped(decode(example.data), 32, 1)
        difference = (augment.normalize(ours[None].float())[0] - theirs).abs()
        assert example.label == label
        assert difference.mean() < 0.05, "in units of the standard deviation"


# Accuracy


def counted(logits: list[list[float]], labels: list[int]) -> Accuracy:
    network = nn.Flatten()
    images = torch.tensor(logits)[:, :, None, None]
    return score(count_right(network, [(images, torch.tensor(labels))], torch.device("cpu")))


def test_first_and_among_five_are_counted() -> None:
    descending = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    result = counted([descending] * 4, [0, 4, 5, 6])
    assert (result.top1, result.top5, result.n) == (0.25, 0.5, 4)
    log_sum = math.log(sum(math.exp(x) for x in descending))
    assert result.loss == pytest.approx(log_sum - (6 + 2 + 1 + 0) / 4)


def test_with_fewer_than_five_classes_the_right_one_is_among_five() -> None:
    result = counted([[1.0, 2.0, 3.0]] * 3, [0, 1, 2])
    assert (result.top1, result.top5) == (pytest.approx(1 / 3), 1.0)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 7, 1, 1), torch.randint(7, (20,))
    device, network = torch.device("cpu"), nn.Flatten()
    whole = count_right(network, [(logits, labels)], device)
    parts = [
        count_right(network, [(logits[part], labels[part])], device)
        for part in (slice(0, 3), slice(3, 20))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no readable image"):
        score(torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (10, 10), (5, 10), (36000, 50000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    ours = Accuracy(right / n, 1 - right / n, n, 0.0)
    assert ours.interval() == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert ours.interval(5) == pytest.approx((1 - theirs.high, 1 - theirs.low), abs=1e-6)


def test_an_accuracy_says_its_intervals_and_the_number_of_images() -> None:
    text = str(Accuracy(0.5, 1.0, 10, 0.7))
    assert "top-1 50.00% (95 % interval 23.66% to 76.34%)" in text
    assert "0.700 nats, 10 images" in text


# Probabilities and ensembles


def test_the_ensemble_takes_the_arithmetic_mean_of_probabilities() -> None:
    sure = torch.tensor([[0.98, 0.02, 0.0], [0.4, 0.6, 0.0]])
    other = torch.tensor([[0.3, 0.4, 0.3], [0.4, 0.0, 0.6]])
    # first: 0.64, 0.21, 0.15; second: 0.4, 0.3, 0.3, of which neither member has the first highest
    labels = torch.tensor([0, 0])
    assert ensemble([sure], labels).top1 == 0.5
    assert ensemble([other], labels).top1 == 0.0
    result = ensemble([sure, other], labels)
    assert result.top1 == 1.0
    assert result.loss == pytest.approx(-(math.log(0.64) + math.log(0.4)) / 2, rel=1e-5)
    certain = torch.tensor([[1.0, 0.0]])
    assert math.isfinite(ensemble([certain, certain], torch.tensor([1])).loss)


def test_networks_that_do_not_match_make_no_ensemble() -> None:
    with pytest.raises(ValueError, match=r"\[\(2, 3\), \(2, 4\)\]"):
        ensemble([torch.ones(2, 3), torch.ones(2, 4)], torch.tensor([0, 1]))


@pytest.mark.parametrize("crops", [1, 10, 144])
def test_an_images_probabilities_are_the_mean_over_its_crops(crops: int, data: Path) -> None:
    torch.manual_seed(0)
    network, source = TinyNetwork(TINY).eval(), open_source(data, "val")
    found, labels, damaged = probabilities(network, source, 32, crops, batch=7)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert damaged == {}
    for index, row in itertools.islice(enumerate(found), 0, 12, 5):
        parts = torch.stack(cropped(decode(source[index].data), 32, crops)).float()
        with torch.no_grad():
            expected = network(augment.normalize(parts)).softmax(1).mean(0)
        torch.testing.assert_close(row, expected)


def test_the_three_squares_of_a_square_photograph_are_one_and_computed_once() -> None:
    """GoogLeNet's 144 crops are then 48, three times each."""
    for width, height, different in ((64, 64, 48), (66, 64, 96), (375, 500, 144)):
        assert len(set(views(width, height, 32, 144))) == different
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    parts = cropped(pixels, 32, 144)
    assert len(parts) == 144
    assert len({id(part) for part in parts}) == 48
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 48


def test_a_square_photograph_among_others_counts_its_crops_as_often_as_they_occur(
    tmp_path: Path,
) -> None:
    square = encoded(synthetic(7, 64, 64), quality=90)
    (write_folder(tmp_path) / "val" / "ant" / "001.JPEG").write_bytes(square)
    torch.manual_seed(0)
    network, source = TinyNetwork(TINY).eval(), open_source(tmp_path, "val")
    found, _, _ = probabilities(network, source, 32, 144, batch=1000)
    for index in (0, 1, 2):
        parts = torch.stack(cropped(decode(source[index].data), 32, 144)).float()
        with torch.no_grad():
            expected = network(augment.normalize(parts)).softmax(1).mean(0)
        torch.testing.assert_close(found[index], expected)


def test_damaged_images_are_left_out_and_named(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path), "val")
    (tmp_path / "val" / "bee" / "001.JPEG").write_bytes(b"no image")
    (tmp_path / "val" / "cat" / "000.JPEG").unlink()
    found, labels, damaged = probabilities(TinyNetwork(TINY).eval(), source, 32)
    assert set(damaged) == {"bee/001.JPEG", "cat/000.JPEG"}
    assert found.shape == (10, 3)
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    for name in source.classes:
        for path in (tmp_path / "val" / name).iterdir():
            path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 12 images"):
        probabilities(TinyNetwork(TINY).eval(), source, 32)


def test_a_network_of_fewer_classes_is_refused(data: Path) -> None:
    network = TinyNetwork(TINY.replace(num_classes=2)).eval()
    with pytest.raises(ValueError, match="has 3 classes, the network 2"):
        probabilities(network, open_source(data, "val"), 32)


# Networks from files


def test_a_runs_folder_its_network_and_its_checkpoint_all_give_the_averaged_weights(
    data: Path, tmp_path: Path
) -> None:
    train(TINY, data, tmp_path, QUIET)
    (path,) = checkpoint.checkpoints(tmp_path)
    average = checkpoint.load(path)["average"]
    for place in (tmp_path, tmp_path / "network.pt", path):
        network, recipe = load_network(place)
        assert recipe == TINY
        assert not network.training
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, average[f"module.{name}"]), (place, name)
    evaluated, saved = (load_network(p)[0].state_dict() for p in (tmp_path, path))
    assert not torch.equal(evaluated["norm1.running_var"], saved["norm1.running_var"])
    (tmp_path / "network.pt").unlink()
    again = load_network(tmp_path)[0].state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in again.items())


def test_weights_that_do_not_fit_their_recipe_are_refused(data: Path, tmp_path: Path) -> None:
    state = {"recipe": TINY.to_json(), "step": 1, "model": TinyNetwork(TINY).state_dict()}
    del state["model"]["conv1.weight"]  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "network.pt")
    with pytest.raises(CheckpointError, match="do not fit its own recipe"):
        load_network(tmp_path)
