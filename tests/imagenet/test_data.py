"""The data path: decoded right or named, in an order that depends on seed and step alone."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, synthetic, write_folder
from PIL import Image, ImageOps
from torch import Tensor

from bnlib.imagenet import recipe
from bnlib.imagenet.data import augment, pack
from bnlib.imagenet.data import decode as decoding
from bnlib.imagenet.data.decode import DamagedImage, Encoded, decode
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.order import Order, generator, local_positions, steps_per_epoch
from bnlib.imagenet.data.source import SourceError

SMALL = recipe("bn-x5").replace(image_size=32, num_classes=3, batch_size=8, shards=6, seed=7)


def reference(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("packed")
    status = pack.main(
        [str(folder), str(destination), "--shorter-side", "64", "--quality", "95", "--workers", "2"]
    )
    assert status == 0
    return destination


# Order


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch_alone() -> None:
    order = Order(100, seed=3, shards=7, within_shard_shuffling=True)
    late_first = [order.indices(epoch) for epoch in (5, 0, 1)]
    again = [Order(100, 3, 7, True).indices(epoch) for epoch in (5, 0, 1)]
    for ours, theirs in zip(late_first, again, strict=True):
        assert ours.dtype == np.int64
        assert sorted(ours) == list(range(100))
        np.testing.assert_array_equal(ours, theirs)
    assert (late_first[1] != late_first[2]).any()
    assert (Order(100, 4, 7, True).indices(0) != late_first[1]).any()


def neighbors(indices: np.ndarray) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in itertools.pairwise(indices)}


def test_without_within_shard_shuffling_the_same_examples_stay_together() -> None:
    n, shards = 120, 6
    fixed = Order(n, 0, shards, within_shard_shuffling=False)
    kept = neighbors(fixed.indices(0)) & neighbors(fixed.indices(1))
    assert len(kept) >= n - shards
    assert (fixed.indices(0) != fixed.indices(1)).any(), "the shards themselves are shuffled"


def test_with_within_shard_shuffling_only_the_shards_stay_together() -> None:
    n, shards = 120, 6
    shuffled = Order(n, 0, shards, within_shard_shuffling=True)
    first, second = shuffled.indices(0), shuffled.indices(1)
    assert len(neighbors(first) & neighbors(second)) < n // 10
    parts = [{frozenset(part) for part in np.split(indices, shards)} for indices in (first, second)]
    assert parts[0] == parts[1]


def test_examples_are_spread_over_the_shards_at_random() -> None:
    indices = Order(1000, 0, 10, within_shard_shuffling=False).indices(0)
    assert all(np.ptp(part) > 500 for part in np.split(indices, 10))


def test_shards_of_one_example_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert len(Order(5, 0, 1024, within_shard_shuffling=False).indices(0)) == 5
    assert "fewer shards" in caplog.text


def test_the_processes_parts_of_the_batches_are_disjoint_and_make_the_whole() -> None:
    n, batch_size, world = 103, 12, 3
    seen = [
        position
        for batch in range(steps_per_epoch(n, batch_size))
        for rank in range(world)
        for position in local_positions(batch, batch_size, rank, world)
    ]
    assert seen == list(range(96))


def test_a_batch_that_cannot_be_divided_or_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        local_positions(0, 32, 0, 3)
    with pytest.raises(ValueError, match="rank is 2"):
        local_positions(0, 32, 2, 2)
    with pytest.raises(ValueError, match="at most 5"):
        steps_per_epoch(5, 32)


# Augmentation


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
def test_a_photograph_that_no_crop_fits_gives_its_middle(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    rng = generator(0, 2)
    boxes = {augment.training_crop(*size, rng, min_area=0.9) for _ in range(20)}
    assert expected in boxes
    assert all(box.width >= 1 and box.height >= 1 for box in boxes)


def test_an_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    def drawn(seed: int = 1, epoch: int = 2, index: int = 3) -> augment.Augmentation:
        return augment.draw(500, 375, seed=seed, epoch=epoch, index=index)

    assert drawn() == drawn()
    assert len({drawn(), drawn(seed=2), drawn(epoch=3), drawn(index=4), drawn(3, 2, 1)}) == 5


def test_flips_orders_and_factors_are_drawn_evenly_and_reduced_strength_halves_them() -> None:
    full, half, none = (
        [augment.draw(50, 50, seed=0, epoch=0, index=i, photometric=s) for i in range(3000)]
        for s in (1.0, 0.5, 0.0)
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


# Decoding

IMAGE = synthetic(3)
ODD = synthetic(4, 101, 67)


@pytest.fixture(params=["TorchCodec", "PIL"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "PIL":
        monkeypatch.setattr(decoding, "_torchcodec", lambda: None)
    assert decoding.decoder() == name
    return name


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(IMAGE), id="jpeg"),
        pytest.param(encoded(ODD, progressive=True), id="progressive"),
        pytest.param(encoded(IMAGE, subsampling=0), id="4:4:4"),
        pytest.param(encoded(ODD, restart_marker_rows=1), id="restart markers"),
        pytest.param(encoded(IMAGE.convert("L")), id="gray jpeg"),
        pytest.param(encoded(IMAGE.convert("CMYK")), id="cmyk"),
        pytest.param(encoded(IMAGE, "PNG"), id="png, misnamed"),
        pytest.param(encoded(IMAGE.convert("P"), "PNG"), id="palette"),
        pytest.param(encoded(IMAGE.convert("1"), "PNG"), id="one bit"),
        pytest.param(encoded(IMAGE, "BMP"), id="bmp"),
        pytest.param(encoded(IMAGE, "WEBP", lossless=True), id="webp"),
        pytest.param(encoded(IMAGE.convert("P"), "GIF"), id="gif"),
        pytest.param(encoded(IMAGE.resize((1, 1))), id="one pixel"),
        pytest.param(encoded(IMAGE) + b"behind the end", id="something behind the end"),
        pytest.param(encoded(IMAGE, exif=b"Exif\0\0nonsense"), id="damaged exif"),
    ],
)
def test_every_kind_of_image_is_decoded_as_pil_does(data: bytes, either_decoder: str) -> None:
    pixels = decode(data, "some.JPEG")
    expected = reference(data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == expected.shape
    assert (pixels.int() - expected.int()).abs().max() <= 2


def test_sixteen_bits_become_eight_and_are_not_cut_off() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(ramp), kind))
        assert pixels[0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (200, 10, 10, 255))
    image.paste((10, 200, 10, 0), (0, 0, 2, 2))
    if mode == "P":
        colors = Image.new("P", (4, 2), 1)
        colors.putpalette([10, 200, 10, 200, 10, 10])
        colors.paste(0, (0, 0, 2, 2))
        data = encoded(colors, "PNG", transparency=0)
    else:
        data = encoded(image.convert(mode), "PNG")
    pixels = decode(data)
    assert pixels[:, :, :2].unique().tolist() == [255]
    assert (pixels[1, :, 2:] < 100).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(ODD, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = Encoded(data)
    assert (image.width, image.height) == upright.size
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert (image.decode().int() - expected.int()).abs().max() <= 2
    box = augment.Box(3, 5, 40, 32)
    part = image.crop(box, (32, 40))
    assert (part.int() - expected[:, 5:37, 3:43].int()).abs().max() <= 2


GOOD = encoded(IMAGE, quality=95)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(GOOD[: len(GOOD) // 2], "cut short", id="half a jpeg"),
        pytest.param(GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2), "cut short", id="zero tail"),
        pytest.param(GOOD[:40], "Truncated", id="a header only"),
        pytest.param(b"<html>not found</html>", "known kind", id="a web page"),
        pytest.param(encoded(IMAGE, "PNG")[:900], "truncated", id="half a png"),
        pytest.param(bytes(5000), "known kind", id="zeros"),
        pytest.param(
            encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "scale", id="float"
        ),
    ],
)
def test_a_damaged_image_is_an_error_that_names_it(
    data: bytes, reason: str, either_decoder: str
) -> None:
    with pytest.raises(DamagedImage, match=reason) as caught:
        decode(data, "n01440764/broken.JPEG")
    assert caught.value.name == "n01440764/broken.JPEG"
    assert str(caught.value).startswith("n01440764/broken.JPEG: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_random_damage_is_never_another_error() -> None:
    rng = np.random.default_rng(0)
    kinds = [
        GOOD,
        encoded(IMAGE, "PNG"),
        encoded(IMAGE.convert("P"), "GIF"),
        encoded(IMAGE, "TIFF"),
    ]
    outcomes = []
    for trial in range(200):
        data = bytearray(kinds[trial % 4])
        for _ in range(3):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            outcomes.append(decode(bytes(data), max_pixels=10**6).dtype)
        except DamagedImage as error:
            outcomes.append(error.name)
    assert outcomes.count("image") > 10
    assert outcomes.count(torch.uint8) > 10


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("L", (4000, 3000)), kind)
        with pytest.raises(DamagedImage, match=r"4000x3000 pixels .* 1000000"):
            decode(data, max_pixels=1_000_000)
        assert decode(data).shape == (3, 3000, 4000)


@pytest.mark.parametrize("size", [150, 64, 30])
def test_a_crop_is_that_of_torchvision_at_full_or_reduced_scale(
    size: int, either_decoder: str
) -> None:
    from torchvision.transforms import v2

    data = encoded(synthetic(6, 480, 360), quality=95)
    box = augment.Box(37, 21, 301, 277)
    ours = Encoded(data).crop(box, size)
    whole = reference(data)
    theirs = v2.functional.resized_crop(whole, box.top, box.left, box.height, box.width, [size] * 2)
    assert ours.shape == (3, size, size)
    assert (ours.float() - theirs.float()).abs().mean() < 2.5
    shifted = v2.functional.resized_crop(whole, 30, 50, box.height, box.width, [size] * 2)
    assert (shifted.float() - theirs.float()).abs().mean() > 5, "the comparison can tell"


def test_without_torchcodec_pil_decodes_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    decoding._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    try:
        assert decoding.decoder() == "PIL"
        assert decode(GOOD).shape == (3, 72, 96)
        assert caplog.text.count("decoded by PIL") == 1
    finally:
        decoding._torchcodec.cache_clear()


# Sources


def test_a_folder_gives_bytes_labels_and_names_in_a_fixed_order(folder: Path) -> None:
    source = open_source(folder, "train")
    assert len(source) == 36
    assert source.classes == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    example = source[13]
    assert example.name == "bee/001.JPEG"
    assert example.label == 1
    assert example.data == (folder / "train" / "bee" / "001.JPEG").read_bytes()


def test_files_that_are_no_images_are_passed_over_and_odd_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "train" / "é b").mkdir(parents=True)
    for name in ("ü 1.JPG", "2.png", ".DS_Store", "._2.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "train" / "é b" / name).write_bytes(GOOD)
    source = open_source(tmp_path, "train")
    assert [source[i].name for i in range(len(source))] == ["é b/2.png", "é b/ü 1.JPG"]


def test_a_label_means_the_same_class_in_both_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=2)
    shutil.rmtree(tmp_path / "val" / "ant")
    assert open_source(tmp_path, "val").labels.tolist() == [1, 1, 2, 2]
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(SourceError, match="does not have: dog"):
        open_source(tmp_path, "val")


def test_the_fingerprint_changes_with_a_name_a_size_and_a_label(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=0)
    seen = {open_source(tmp_path, "train").fingerprint()}
    assert open_source(tmp_path, "train").fingerprint() in seen
    first = tmp_path / "train" / "ant" / "000.JPEG"
    first.write_bytes(first.read_bytes() + b"!")
    seen.add(open_source(tmp_path, "train").fingerprint())
    first.rename(first.with_name("0000.JPEG"))
    seen.add(open_source(tmp_path, "train").fingerprint())
    (tmp_path / "train" / "bee").rename(tmp_path / "train" / "dog")
    seen.add(open_source(tmp_path, "train").fingerprint())
    assert len(seen) == 4


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere", "train")
    with pytest.raises(SourceError, match=r"looked for train/<class>/\*.*found nothing"):
        open_source(tmp_path, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="not a folder"):
        open_source(tmp_path / "file", "train")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(SourceError, match="no images in"):
        open_source(tmp_path, "train")
    with pytest.raises(ValueError, match="split"):
        open_source(tmp_path, "test")


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of ImageNet's, in its own form, with their own checksums."""
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    wnids = ["n01440764", "n01443537"]
    for wnid in wnids:
        tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": GOOD for i in range(3)})
    inner = {f"{wnid}.tar": (tmp_path / f"{wnid}.tar").read_bytes() for wnid in wnids}
    tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    tar(
        tmp_path / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{i:08}.JPEG": GOOD for i in range(1, 5)},
    )
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("n", "i4")]
    synsets = np.array([(i + 1, w, "fish", "", 0) for i, w in enumerate(wnids)], dtype=kinds)
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    data = "ILSVRC2012_devkit_t12/data"
    truth = f"{data}/ILSVRC2012_validation_ground_truth.txt"
    tar(
        tmp_path / "ILSVRC2012_devkit_t12.tar.gz",
        {f"{data}/meta.mat": matrix.getvalue(), truth: b"2\n1\n2\n2\n"},
    )
    sums = {
        kind: (name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest())
        for kind, (name, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    return tmp_path


def test_imagenets_own_archives_are_unpacked_once(archives: Path) -> None:
    train, val = open_source(archives, "train"), open_source(archives, "val")
    assert train.classes == val.classes == ["n01440764", "n01443537"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 1, 1, 1]
    assert val[0].name.endswith("ILSVRC2012_val_00000002.JPEG")
    (archives / "ILSVRC2012_img_train.tar").unlink()
    assert open_source(archives, "train").fingerprint() == train.fingerprint()


def test_an_interrupted_unpacking_does_not_pass_for_a_data_set(archives: Path) -> None:
    (archives / ".unpacking-train" / "n01440764").mkdir(parents=True)
    assert len(open_source(archives, "train")) == 6
    (archives / "ILSVRC2012_img_val.tar").write_bytes(b"damaged")
    with pytest.raises(SourceError, match=r"img_val\.tar cannot be unpacked"):
        open_source(archives, "val")
    assert not (archives / "val").exists()
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(SourceError, match="development kit"):
        open_source(archives, "val")


@pytest.mark.parametrize("form", ["saved", "parquet", "arrow"])
def test_hugging_face_data_sets_give_the_same_examples(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = open_source(folder, "val")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=plain.classes)}
    )
    rows = {
        "image": [{"bytes": plain[i].data, "path": plain[i].name} for i in range(len(plain))],
        "label": plain.labels.tolist(),
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    if form == "saved":
        datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(tmp_path / "set")
    elif form == "parquet":
        (tmp_path / "set" / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet")
    else:
        made.save_to_disk(tmp_path / "set" / "val")
    source = open_source(tmp_path / "set", "val")
    assert source.classes == plain.classes
    assert source.labels.tolist() == plain.labels.tolist()
    assert [source[i][:2] for i in range(len(source))] == [plain[i][:2] for i in range(len(plain))]
    assert source.fingerprint() == open_source(tmp_path / "set", "val").fingerprint()
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3].data == source[3].data


def test_a_missing_package_for_hugging_face_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'bnlib\[hub\]'"):
        open_source("hf:ILSVRC/imagenet-1k", "train")


def test_a_data_set_without_the_split_or_the_labels_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [{"bytes": GOOD, "path": None}], "text": ["a"]})
    made = made.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path)
    with pytest.raises(SourceError, match="has the splits train; for val"):
        open_source(tmp_path, "val")
    with pytest.raises(SourceError, match=r"columns \['image', 'text'\]"):
        open_source(tmp_path, "train")


# Mini-batches

Batch = tuple[int, Tensor, Tensor]


def first(batches_: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches_, count))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for (step, images, labels), (step_, images_, labels_) in zip(ours, theirs, strict=True):
        assert step == step_
        assert torch.equal(images, images_)
        assert torch.equal(labels, labels_)


@pytest.mark.parametrize("form", ["folder", "packed"])
def test_the_batches_are_the_same_for_every_number_of_workers(
    form: str, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(form), "train")
    alone = first(batches(source, SMALL), 6)
    assert_same(first(batches(source, SMALL, workers=2), 6), alone)
    images, labels = alone[0][1:]
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert not torch.equal(alone[0][1], alone[4][1]), "another epoch, other crops"


def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = first(batches(source, SMALL), 11)
    assert [step for step, *_ in whole] == list(range(11))
    for start in (1, 4, 9):
        assert_same(first(batches(source, SMALL, start_step=start), 11 - start), whole[start:])


def test_two_processes_share_every_batch_exactly(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = first(batches(source, SMALL), 5)
    parts = [first(batches(source, SMALL, rank=rank, world=2), 5) for rank in (0, 1)]
    joined = [
        (a[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]]))
        for a, b in zip(*parts, strict=True)
    ]
    for ours, theirs in zip(joined, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_epoch_shows_every_example_with_its_label(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = SMALL.replace(batch_size=9)
    labels = torch.cat([labels for _, _, labels in first(batches(source, whole), 4)])
    assert labels.bincount().tolist() == [12, 12, 12]
    assert (labels.diff() != 0).sum() > 10, "the classes are mixed"


def test_making_batches_draws_nothing_from_the_global_generators(folder: Path) -> None:
    source = open_source(folder, "train")
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    first(batches(source, SMALL, workers=1), 2)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def damage(folder: Path, target: Path) -> dict[str, str]:
    shutil.copytree(folder, target)
    ruin = {"ant/003.JPEG": b"", "bee/005.JPEG": GOOD[:300], "cat/000.JPEG": b"<html>"}
    for name, data in ruin.items():
        (target / "train" / name).write_bytes(data)
    return dict.fromkeys(ruin, "")


def test_damaged_images_are_replaced_by_the_next_counted_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ruined = damage(folder, tmp_path / "copy")
    source, sound = open_source(tmp_path / "copy", "train"), open_source(folder, "train")
    whole = SMALL.replace(batch_size=9)
    made = batches(source, whole)
    got, expected = first(made, 8), first(batches(sound, whole), 8)
    assert made.damaged.keys() == ruined.keys()
    assert all(made.damaged.values())
    assert all(caplog.text.count(name) == 1 for name in ruined), "said once, not once an epoch"
    order = Order(36, whole.seed, whole.shards, True)
    names = [sound.name(int(i)) for epoch in (0, 1) for i in order.indices(epoch)]
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for i in range(9):
            position = 9 * step + i
            same = torch.equal(ours[1][i], theirs[1][i])
            if names[position] not in ruined:
                assert same
            elif position % 36 < 35 and names[position + 1] not in ruined:
                following = expected[step][1][i + 1] if i < 8 else expected[step + 1][1][0]
                assert torch.equal(ours[1][i], following)
    parallel = batches(source, whole, workers=2)
    assert_same(first(parallel, 8), got)
    assert parallel.damaged == made.damaged
    assert_same(first(batches(source, whole, start_step=5), 3), got[5:])


def test_a_damaged_image_is_an_error_where_that_is_wanted(folder: Path, tmp_path: Path) -> None:
    damage(folder, tmp_path / "copy")
    source = open_source(tmp_path / "copy", "train")
    with pytest.raises(DamagedImage):
        first(batches(source, SMALL, skip_damaged=False), 9)


def test_a_data_set_that_cannot_be_read_at_all_ends_with_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, train=4, val=0)
    source = open_source(tmp_path, "train")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DamagedImage, match="12 images in a row"):
        first(batches(source, SMALL), 1)


def test_more_classes_than_the_recipe_has_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--num-classes 3"):
        batches(open_source(folder, "train"), SMALL.replace(num_classes=2))


UNFINISHED = """
import os, signal, sys
from bnlib.imagenet import recipe
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.folders import open_source
small = recipe("bn-x5").replace(image_size=32, num_classes=3, batch_size=8, shards=6)
made = batches(open_source(sys.argv[1], "train"), small, workers=1)
next(made)
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
os.killpg(0, signal.SIGTERM)
for _ in range(12):
    next(made)
print("went on", flush=True)
made.circle = made  # a circle, which only the end of the process opens
"""


def test_workers_survive_a_signal_to_the_group_and_end_with_the_process(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert done.stdout.split("\n")[:2] == ["told", "went on"]
    assert done.returncode == 0, done.stderr


# Packing


def test_the_packed_copy_has_the_same_photographs_made_smaller(folder: Path, packed: Path) -> None:
    for split in ("train", "val"):
        plain, small = open_source(folder, split), open_source(packed, split)
        assert small.classes == plain.classes
        assert small.labels.tolist() == plain.labels.tolist()
        assert small.fingerprint() != plain.fingerprint()
        for index in range(len(plain)):
            example = small[index]
            assert example.name == plain[index].name
            before, after = Encoded(plain[index].data), Encoded(example.data)
            assert min(after.width, after.height) == 64
            expected = before.resize_shorter(64).float()
            assert (after.decode().float() - expected).abs().mean() < 4
    assert (packed / "train" / "damaged.tsv").read_text() == "name\treason\n"


def test_a_small_jpeg_is_packed_as_it_is_and_other_images_become_jpegs() -> None:
    assert pack.repacked(GOOD, "a", 72, 90) == GOOD
    assert pack.repacked(GOOD, "a", 71, 90) != GOOD
    packed_png = pack.repacked(encoded(IMAGE, "PNG"), "a", 72, 90)
    assert Encoded(packed_png).is_ordinary_jpeg
    with pytest.raises(DamagedImage):
        pack.repacked(GOOD[:-300], "a", 72, 90)


def test_damaged_images_are_left_out_of_the_packed_copy_and_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined = damage(folder, tmp_path / "copy")
    arguments = [str(tmp_path / "copy"), str(tmp_path / "packed"), "--splits", "train"]
    assert pack.main([*arguments, "--workers", "1"]) == 0
    assert "33 images, 3 damaged ones left out" in capsys.readouterr().out
    source = open_source(tmp_path / "packed", "train")
    names = {source[index].name for index in range(len(source))}
    assert len(names) == 33
    assert names.isdisjoint(ruined)
    rows = (tmp_path / "packed" / "train" / "damaged.tsv").read_text().splitlines()[1:]
    assert {row.split("\t")[0] for row in rows} == set(ruined)


def test_a_packed_copy_with_a_changed_bit_is_noticed(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    path = tmp_path / "copy" / "val" / "records-00000.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    settings = ["--shorter-side", "64", "--quality", "95"]
    status = pack.main([str(folder), str(tmp_path / "copy"), *settings])
    assert status == 1
    assert "records-00000.bin is not what was packed" in capsys.readouterr().err
    path.write_bytes(data[:-1])
    with pytest.raises(SourceError, match=r"records-00000\.bin is missing or"):
        open_source(tmp_path / "copy", "val")
    (tmp_path / "copy" / "val" / "index.npz").write_bytes(b"PK damaged")
    with pytest.raises(SourceError, match=r"index\.npz is damaged"):
        open_source(tmp_path / "copy", "val")


def test_a_destination_begun_with_other_settings_is_refused(
    folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack.main([str(folder), str(packed), "--shorter-side", "32", "--quality", "95"]) == 1
    assert "shorter_side 64 there, 32 now" in capsys.readouterr().err
    assert pack.main([str(folder), str(packed), "--quality", "0"]) == 1
    assert pack.main([str(folder / "nowhere"), str(packed)]) == 1


KILLED = """
import sys
from bnlib.imagenet.data import pack
pack.RECORDS_PER_FILE = 4
if __name__ == "__main__":
    sys.exit(pack.main(sys.argv[1:]))
"""


def test_packing_that_was_killed_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    destination = tmp_path / "packed"
    command = [sys.executable, str(script), str(folder), str(destination)]
    command += ["--splits", "train", "--shorter-side", "64", "--quality", "95", "--workers"]
    process = subprocess.Popen([*command, "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (noted := list(destination.glob("train/records-*.json"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in noted}
    kept = {path.with_suffix(".bin"): path.with_suffix(".bin").stat().st_mtime_ns for path in done}
    subprocess.run([*command, "2"], check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "not done twice"
    source, plain = open_source(destination, "train"), open_source(folder, "train")
    assert [source[i].name for i in range(36)] == [plain.name(i) for i in range(36)]
    left = sorted(path.name for path in (destination / "train").iterdir())
    assert left == sorted(
        ["damaged.tsv", "index.npz", "plan.json", *(f"records-{n:05}.bin" for n in range(9))]
    )


# Real photographs

TINY = Path(os.environ.get("BNLIB_DATA", "")) / "tiny-imagenet-100" / "val.tar"


@pytest.mark.skipif(not TINY.is_file(), reason="set BNLIB_DATA to a folder with tiny-imagenet-100")
def test_real_photographs_pass_through_the_whole_path(tmp_path: Path) -> None:
    with tarfile.open(TINY) as archive:
        members = [entry for entry in archive.getmembers() if entry.isfile()][:400]
        archive.extractall(tmp_path, members, filter="data")
    (tmp_path / "val").rename(tmp_path / "train")
    source = open_source(tmp_path, "train")
    assert len(source) == 400
    recipe_ = SMALL.replace(num_classes=100, batch_size=100, photometric=0.0)
    made = batches(source, recipe_)
    images = torch.cat([images for _, images, _ in first(made, 4)])
    assert not made.damaged
    assert images.mean().abs() < 0.5
    assert 0.7 < images.std() < 1.4
