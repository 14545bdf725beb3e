"""Images are decoded right, or named with what is wrong."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from image_sets import GOOD, reference
from images import encoded, synthetic
from PIL import Image, ImageFile, ImageOps

from bnlib.imagenet.data import augment
from bnlib.imagenet.data import decode as decoding
from bnlib.imagenet.data.decode import DamagedImage, Encoded

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
    pixels = Encoded(data, "some.JPEG").decode()
    expected = reference(data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == expected.shape
    assert (pixels.int() - expected.int()).abs().max() <= 2


def test_sixteen_bits_become_eight_and_are_not_cut_off() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        pixels = Encoded(encoded(Image.fromarray(ramp), kind)).decode()
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
    pixels = Encoded(data).decode()
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
    part = image.crop(box, 32, 40)
    assert (part.int() - expected[:, 5:37, 3:43].int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(GOOD[: len(GOOD) // 2], "cut short", id="half a jpeg"),
        pytest.param(GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2), "cut short", id="zero tail"),
        pytest.param(
            encoded(IMAGE, exif=b"Exif\0\0 a thumbnail's end: \xff\xd9")[:-500],
            "cut short",
            id="cut short behind a whole thumbnail",
        ),
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
        Encoded(data, "n01440764/broken.JPEG").decode()
    assert caught.value.name == "n01440764/broken.JPEG"
    assert str(caught.value).startswith("n01440764/broken.JPEG: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_random_damage_is_never_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10**6)
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
            outcomes.append(Encoded(bytes(data)).decode().dtype)
        except DamagedImage as error:
            outcomes.append(error.name)
    assert outcomes.count("image") > 10
    assert outcomes.count(torch.uint8) > 10


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(Image.new("L", (4000, 3000)), kind) for kind in ("PNG", "JPEG")]
    for data in images:
        assert Encoded(data).decode().shape == (3, 3000, 4000)
    images.append(png_with_exif_at_the_end(Image.new("L", (4000, 3000)), 1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1_000_000)
    for data in images:
        with pytest.raises(DamagedImage, match=r"4000x3000 pixels .* 1000000"):
            Encoded(data)


def png_with_exif_at_the_end(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = b"eXIf" + exif.tobytes()[6:]
    end = len(chunk) - 4, chunk, zlib.crc32(chunk)
    data = encoded(image, "PNG")
    return data[:-12] + struct.pack(f">I{len(chunk)}sI", *end) + data[-12:]


def test_exif_data_behind_the_pixels_are_obeyed() -> None:
    image = Encoded(png_with_exif_at_the_end(ODD, 6))
    assert (image.width, image.height) == (67, 101)
    turned = torch.from_numpy(np.array(ODD.rotate(-90, expand=True))).permute(2, 0, 1)
    assert torch.equal(image.decode(), turned)


@pytest.mark.parametrize("size", [150, 64, 30])
def test_a_crop_is_that_of_torchvision(size: int, either_decoder: str) -> None:
    from torchvision.transforms import v2

    data = encoded(synthetic(6, 480, 360), quality=95)
    box = augment.Box(37, 21, 301, 277)
    ours = Encoded(data).crop(box, size, size)
    whole = reference(data)
    theirs = v2.functional.resized_crop(whole, box.top, box.left, box.height, box.width, [size] * 2)
    assert ours.shape == (3, size, size)
    assert (ours.float() - theirs.float()).abs().mean() < 0.1
    shifted = v2.functional.resized_crop(whole, 30, 50, box.height, box.width, [size] * 2)
    assert (shifted.float() - theirs.float()).abs().mean() > 5, "the comparison can tell"


def test_a_crop_is_made_of_the_pixels_that_decoding_gives(either_decoder: str) -> None:
    image = Encoded(encoded(synthetic(6, 480, 360)))
    box = augment.Box(37, 21, 301, 277)
    assert torch.equal(image.crop(box, 277, 301), image.decode()[:, 21:298, 37:338])


def test_without_torchcodec_pil_decodes_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    decoding._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    try:
        assert decoding.decoder() == "PIL"
        assert Encoded(GOOD).decode().shape == (3, 72, 96)
        assert caplog.text.count("decoded by PIL") == 1
    finally:
        decoding._torchcodec.cache_clear()
