"""Mini-batches decoded together on a device: the same examples, and nearly the same pixels.

No test needs a GPU: TorchCodec's decoder for the CPU takes the place of nvJPEG.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_runs import TINY, changed, use_tiny_network
from PIL import Image
from test_data import (
    GOOD,
    IMAGE,
    SMALL,
    assert_same,
    encoded,
    first,
    photograph,
    reference,
    write_folder,
)
from torch import Tensor
from torchvision.transforms import v2

from bnlib.imagenet.data import augment, batch_decode, pack
from bnlib.imagenet.data.augment import Box
from bnlib.imagenet.data.batch_decode import Part, fill, is_chosen, part_for_device
from bnlib.imagenet.data.decode import DamagedImage, Encoded, decode
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.options import Settings
from bnlib.imagenet.training.loop import train

torchcodec = pytest.importorskip("torchcodec.decoders")

# No distortions, so that gray levels can be compared; crops that are not decoded at half the size.
PLAIN = SMALL.replace(photometric=0.0, image_size=64, batch_size=9)
CPU = torch.device("cpu")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(IMAGE, exif=exif, quality=90)


FOR_WORKERS = {
    "ant/001.JPEG": encoded(IMAGE, "PNG"),
    "ant/002.JPEG": encoded(IMAGE.convert("CMYK"), quality=90),
    "bee/003.JPEG": turned(),
    "cat/004.JPEG": encoded(IMAGE, keep_rgb=True, quality=90),
}
FOR_DEVICE = {
    "ant/005.JPEG": encoded(IMAGE.convert("L"), quality=90),
    "bee/006.JPEG": encoded(IMAGE, progressive=True, quality=90),
    "cat/007.JPEG": encoded(photograph(5, 90, 211), restart_marker_rows=1),
}
# A complete JPEG without the tables that its pixels need: only a decoder finds that out.
HOLLOW = GOOD.replace(b"\xff\xdb", b"\xff\xfe")
DAMAGED = {
    "ant/003.JPEG": b"",
    "ant/009.JPEG": HOLLOW,
    "bee/005.JPEG": GOOD[:300],
    "bee/010.JPEG": HOLLOW + b" ",
    "bee/011.JPEG": HOLLOW + b"  ",
    "cat/000.JPEG": b"<html>",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_folder(tmp_path_factory.mktemp("mixed"))
    for name, data in {**FOR_WORKERS, **FOR_DEVICE}.items():
        (root / "train" / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def ruined(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ruined") / "copy"
    shutil.copytree(mixed, root)
    for name, data in DAMAGED.items():
        (root / "train" / name).write_bytes(data)
    return root


@pytest.fixture
def device_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU count as a device that decodes mini-batches."""
    monkeypatch.setattr(batch_decode, "DEVICES", ("cpu", "cuda"))
    batch_decode._obstacle.cache_clear()


@pytest.fixture
def calls(device_is_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """What the device is asked to decode."""
    seen: list[list[bytes]] = []

    def decode_jpeg(files: list[bytes], **options: Any) -> list[Tensor]:
        seen.append(files)
        decoded: list[Tensor] = torchcodec.decode_jpeg(files, **options)
        return decoded

    monkeypatch.setattr(batch_decode, "_decode_jpeg", lambda: decode_jpeg)
    return seen


def gray_levels(ours: Tensor, theirs: Tensor) -> Tensor:
    """Differences of normalized images in gray levels."""
    return (ours - theirs).abs() * torch.tensor(augment.STD).view(3, 1, 1) * 255


def test_both_ways_make_the_same_mini_batches(mixed: Path, calls: list[list[bytes]]) -> None:
    source = open_source(mixed, "train")
    on_cpu = first(batches(source, PLAIN, decode="cpu"), 8)
    assert not calls
    together = first(batches(source, PLAIN, decode="gpu"), 8)
    assert len(calls) == 1 + 8, "one trial, then one call for each mini-batch"
    asked = {file for files in calls for file in files}
    assert asked.isdisjoint(FOR_WORKERS.values())
    whole = {data for name, data in FOR_DEVICE.items() if name != "cat/007.JPEG"}
    assert whole <= asked
    exact = 0
    for (step, images, labels), (step_, images_, labels_) in zip(together, on_cpu, strict=True):
        assert step == step_
        assert torch.equal(labels, labels_)
        assert images.shape == images_.shape
        assert images.dtype == images_.dtype
        difference = gray_levels(images, images_)
        assert difference.max() < 2.01
        assert (difference.mean((1, 2, 3)) < 0.7).all()
        exact += int((difference.amax((1, 2, 3)) == 0).sum())
    assert 2 * len(FOR_WORKERS) <= exact < 36, "in two epochs, what workers decode is the same"


def test_distorted_and_flipped_crops_are_the_same_to_a_level(
    mixed: Path, device_is_cpu: None
) -> None:
    source = open_source(mixed, "train")
    full = PLAIN.replace(photometric=1.0)
    pairs = zip(
        first(batches(source, full, decode="gpu"), 4),
        first(batches(source, full, decode="cpu"), 4),
        strict=True,
    )
    for (_, images, _), (_, images_, _) in pairs:
        assert (gray_levels(images, images_).mean((1, 2, 3)) < 1).all()


@pytest.mark.parametrize("kind", ["mixed", "ruined"])
def test_workers_and_the_first_step_change_no_mini_batch(
    kind: str, device_is_cpu: None, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(kind), "train")
    alone = batches(source, PLAIN, decode="gpu")
    expected = first(alone, 9)  # more than two epochs: what is known must change nothing
    parallel = batches(source, PLAIN, workers=2, decode="gpu")
    assert_same(first(parallel, 9), expected)
    assert parallel.damaged == alone.damaged
    for start in (1, 6):
        resumed = batches(source, PLAIN, start_step=start, decode="gpu")
        assert_same(first(resumed, 9 - start), expected[start:])


def test_damaged_images_are_replaced_as_on_the_cpu(
    ruined: Path, device_is_cpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(ruined, "train")
    on_cpu, together = (batches(source, PLAIN, decode=how) for how in ("cpu", "gpu"))
    theirs = first(on_cpu, 8)
    caplog.clear()
    ours = first(together, 8)
    assert together.damaged.keys() == on_cpu.damaged.keys() == DAMAGED.keys()
    assert all(caplog.text.count(f"{name}: ") == 1 for name in DAMAGED), "each is said once"
    assert caplog.text.count("tried on the CPU") == 1
    for (_, images, labels), (_, images_, labels_) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, labels_)
        assert gray_levels(images, images_).max() < 2.01


def test_a_damaged_image_is_an_error_where_that_is_wanted(
    mixed: Path, tmp_path: Path, device_is_cpu: None
) -> None:
    shutil.copytree(mixed, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "ant" / "009.JPEG").write_bytes(HOLLOW)
    source = open_source(tmp_path / "copy", "train")
    with pytest.raises(DamagedImage, match=r"ant/009\.JPEG"):
        first(batches(source, PLAIN, skip_damaged=False, decode="gpu"), 4)


def test_what_only_the_device_refuses_is_decoded_on_the_cpu(
    mixed: Path,
    device_is_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gray = FOR_DEVICE["ant/005.JPEG"]

    def decode_jpeg(files: list[bytes], **options: Any) -> Any:
        if gray in files:
            raise RuntimeError("Unknown chroma\nsubsampling")
        return torchcodec.decode_jpeg(files, **options)

    source = open_source(mixed, "train")
    expected = first(batches(source, PLAIN, decode="cpu"), 8)
    plain = first(batches(source, PLAIN, decode="gpu"), 8)
    monkeypatch.setattr(batch_decode, "_decode_jpeg", lambda: decode_jpeg)
    made = batches(source, PLAIN, decode="gpu")
    got = first(made, 8)
    assert not made.damaged
    assert caplog.text.count("(Unknown chroma subsampling)") == 1
    replaced = 0
    for (_, images, labels), (_, images_, labels_), (_, usual, _) in zip(
        got, expected, plain, strict=True
    ):
        assert torch.equal(labels, labels_)
        other = (images != usual).flatten(1).any(1)
        assert torch.equal(images[other], images_[other])
        replaced += int(other.sum())
    assert replaced == 2, "once an epoch"


def test_a_device_without_memory_is_not_taken_for_a_damaged_image(
    device_is_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_jpeg(files: list[bytes], **options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(batch_decode, "_decode_jpeg", lambda: decode_jpeg)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(torch.OutOfMemoryError):
        fill(images, [Part(0, GOOD, Box(0, 0, 8, 8), False)])


def test_two_processes_share_every_mini_batch(mixed: Path, device_is_cpu: None) -> None:
    source = open_source(mixed, "train")
    even = PLAIN.replace(batch_size=10)
    whole = first(batches(source, even, decode="gpu"), 4)
    halves = [first(batches(source, even, rank=rank, world=2, decode="gpu"), 4) for rank in (0, 1)]
    for (_, images, labels), (_, a, a_labels), (_, b, b_labels) in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), images)
        assert torch.equal(torch.cat([a_labels, b_labels]), labels)


def test_of_packed_photographs_only_the_rows_needed_go_to_the_device(
    tmp_path: Path, calls: list[list[bytes]]
) -> None:
    write_folder(tmp_path / "plain", train=4, val=0)
    settings = ["--shorter-side", "70", "--quality", "95", "--workers", "1", "--splits", "train"]
    assert pack.main([str(tmp_path / "plain"), str(tmp_path / "packed"), *settings]) == 0
    source = open_source(tmp_path / "packed", "train")
    some = PLAIN.replace(batch_size=12, image_size=48)
    pairs = zip(
        first(batches(source, some, decode="gpu"), 3),
        first(batches(source, some, decode="cpu"), 3),
        strict=True,
    )
    for (_, images, labels), (_, images_, labels_) in pairs:
        assert torch.equal(labels, labels_)
        assert gray_levels(images, images_).max() < 2.01
    files = {source[index].data for index in range(12)}
    assert any(file not in files for file in itertools.chain(*calls[1:]))


# The part on the device


def test_parts_are_cut_resized_and_flipped_into_their_places() -> None:
    boxes = [Box(37, 21, 301, 277), Box(0, 0, 480, 360), Box(400, 300, 64, 48), Box(5, 9, 64, 64)]
    data = encoded(photograph(6, 480, 360), quality=95)
    images = torch.full((6, 3, 64, 64), 7, dtype=torch.uint8)
    places = (5, 0, 2, 3)
    parts = [Part(p, data, box, p == 2) for p, box in zip(places, boxes, strict=True)]
    assert fill(images, parts) == {}
    assert (images[[1, 4]] == 7).all()
    for place, box in zip(places, boxes, strict=True):
        whole = torchcodec.decode_jpeg(data)
        sizes = (box.top, box.left, box.height, box.width, [64, 64])
        theirs = v2.functional.resized_crop(whole.float(), *sizes).round()
        if place == 2:
            theirs = theirs.flip(-1)
        assert (images[place] - theirs).abs().max() == 0
    assert torch.equal(images[3], whole[:, 9:73, 5:69]), "the right size already: untouched"


@pytest.mark.parametrize("size", [150, 64, 30])
def test_a_crop_agrees_with_the_cpus_at_full_or_reduced_scale(size: int) -> None:
    image = Encoded(encoded(photograph(6, 480, 360), quality=95))
    box = Box(37, 21, 301, 277)
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    assert fill(images, [Part(0, image.data, box, False)]) == {}
    difference = (images[0].float() - image.crop(box, size).float()).abs()
    assert difference.mean() < (0.7 if size == 150 else 2.5)


def test_the_parts_that_are_refused_are_named_and_the_others_stand() -> None:
    images = torch.full((4, 3, 16, 16), 7, dtype=torch.uint8)
    box = Box(10, 10, 16, 16)
    parts = [
        Part(0, GOOD, box, False),
        Part(1, HOLLOW, box, False),
        Part(2, GOOD, Box(90, 10, 16, 16), False),  # not in the photograph
        Part(3, GOOD, box, True),
    ]
    refused = fill(images, parts)
    assert refused.keys() == {1, 2}
    assert all(refused.values())
    assert (images[1:3] == 7).all()
    assert torch.equal(images[0], reference(GOOD)[:, 10:26, 10:26])
    assert torch.equal(images[3], images[0].flip(-1))
    assert fill(images, []) == {}


def test_the_device_is_given_what_every_jpeg_decoder_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = Box(0, 30, 60, 40)
    for data in FOR_WORKERS.values():
        assert part_for_device(Encoded(data), box) is None
    for data in (GOOD, *FOR_DEVICE.values()):
        image = Encoded(data)
        part = part_for_device(image, box)
        assert part is not None
        shown, inside = part
        pixels = decode(shown)[:, inside.top : inside.top + 40, :60]
        assert torch.equal(pixels, image.decode()[:, 30:70, :60])
        assert (len(shown) < len(data)) == (data == FOR_DEVICE["cat/007.JPEG"])
    monkeypatch.setattr(batch_decode, "MOST_PIXELS", 96 * 72 - 1)
    assert part_for_device(Encoded(GOOD), box) is None


# The choice


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do(mixed: Path) -> None:
    source = open_source(mixed, "train")
    with pytest.raises(ValueError, match="on the device cpu: it is no cuda device; set decode to"):
        batches(source, PLAIN, decode="gpu")
    with pytest.raises(ValueError, match="decode is 'GPU'; it must be one of auto, cpu, gpu"):
        batches(source, PLAIN, decode="GPU")
    with pytest.raises(ValueError, match="decode"):
        Settings(decode="nvjpeg")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_the_reason_is_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    batch_decode._obstacle.cache_clear()
    with pytest.raises(ValueError, match=r"on the device cuda: .+; set decode to auto or cpu"):
        is_chosen("gpu", torch.device("cuda"))
    assert not is_chosen("auto", torch.device("cuda"))
    assert caplog.text.count("not decoded on cuda") == 1


def test_without_torchcodec_the_workers_decode(
    mixed: Path, device_is_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    source = open_source(mixed, "train")
    with pytest.raises(ValueError, match=r"torchcodec.*install TorchCodec"):
        batches(source, PLAIN, decode="gpu")
    expected = first(batches(source, PLAIN, decode="cpu"), 1)
    assert_same(first(batches(source, PLAIN), 1), expected)


def test_a_device_that_decodes_wrongly_is_left_alone(
    mixed: Path, device_is_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = batch_decode._decode_jpeg()

    def mirrored(data: list[bytes], *, device: torch.device) -> list[torch.Tensor]:
        return [picture.flip(-1) for picture in right(data, device=device)]

    monkeypatch.setattr(batch_decode, "_decode_jpeg", lambda: mirrored)
    source = open_source(mixed, "train")
    with pytest.raises(ValueError, match=r"test picture is off by \d+ gray levels"):
        batches(source, PLAIN, decode="gpu")
    expected = first(batches(source, PLAIN, decode="cpu"), 1)
    assert_same(first(batches(source, PLAIN), 1), expected)


def test_what_was_chosen_is_said_once(
    mixed: Path, calls: list[list[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert not is_chosen("cpu", CPU)
    assert "decoded on" not in caplog.text
    source = open_source(mixed, "train")
    for _ in range(2):
        first(batches(source, PLAIN), 1)
    assert caplog.text.count("are decoded on cpu, a mini-batch at a time") == 1
    assert len(calls) == 3, "the automatic choice is the device's"


def test_after_the_first_mini_batch_no_constant_is_copied_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, order, factors = torch.rand(2, 3, 4, 4), torch.tensor([[0, 1, 2]] * 2), torch.ones(2, 3)

    def mini_batch() -> Tensor:
        return augment.normalize(augment.distort(images.clone(), order, factors))

    with torch.inference_mode():  # an evaluation may come first
        first_one = mini_batch()

    def copied(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a GPU would be waited for")

    monkeypatch.setattr(torch, "tensor", copied)
    assert torch.equal(mini_batch(), first_one)


@pytest.mark.parametrize("how", ["cpu", "gpu"])
def test_training_decodes_where_the_setting_says(
    how: str,
    tmp_path: Path,
    calls: list[list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_tiny_network(monkeypatch)
    write_folder(tmp_path / "data", train=4, val=2)
    settings = changed(decode=how)
    train(TINY.replace(steps=3), tmp_path / "data", tmp_path / "run", settings)
    assert len(calls) == (1 + 3 + settings.statistics_batches if how == "gpu" else 0)
