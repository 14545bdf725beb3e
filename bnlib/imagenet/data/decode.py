"""From the bytes of an image file to pixels: right, or an error that names the file.

PIL reads the header, which gives the size of the image. TorchCodec, where it works, decodes
ordinary JPEGs (gray or RGB, not to be rotated); PIL decodes everything else: other formats,
whatever the name of the file says, CMYK, images with an Exif orientation. The whole image is
decoded, then cropped, then resized, so that training and evaluation see the same pixels.

Bits that have changed inside a JPEG so that it still can be decoded are not noticed here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bnlib.imagenet.data.augment import Box

__all__ = ["MAX_PIXELS", "DamagedImage", "Encoded", "decoder", "resize"]

_LOGGER = logging.getLogger(__name__)
MAX_PIXELS = 178_956_970  # PIL's own limit: half a gigabyte of pixels
_ORIENTATION = 0x0112  # the Exif tag
_END_OF_IMAGE = b"\xff\xd9"  # the last marker of a JPEG


class DamagedImage(ValueError):  # noqa: N818  (what it is, not that it is an error)
    """Raised if an image cannot be decoded: the name of its file or record, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@lru_cache(maxsize=1)
def _torchcodec() -> Callable[[bytes], Tensor] | None:
    """TorchCodec's JPEG decoder, if it is installed and works with this torch."""
    from PIL import Image

    trial = io.BytesIO()
    Image.new("RGB", (8, 8)).save(trial, "JPEG")
    try:
        decode_jpeg: Any = import_module("torchcodec.decoders").decode_jpeg
        decode_jpeg(trial.getvalue())
    except Exception as error:  # a library made for another torch fails in many ways
        _LOGGER.info("JPEGs are decoded by PIL (TorchCodec: %s)", error)
        return None
    _LOGGER.info(
        "JPEGs are decoded by TorchCodec %s, other images by PIL", metadata.version("torchcodec")
    )
    return lambda data: decode_jpeg(data)


def decoder() -> str:
    """What decodes JPEGs here, "TorchCodec" or "PIL"; logged at the first call."""
    return "TorchCodec" if _torchcodec() else "PIL"


@contextmanager
def wrap_decode_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a :class:`DamagedImage` that names the image."""
    try:
        yield
    except (DamagedImage, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly everything on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedImage(name, reason) from error


class Encoded:
    """An image file in memory: its size at once, its pixels on demand.

    ``width`` and ``height``, in pixels, are those after the rotation that Exif data ask for;
    ``is_ordinary_jpeg`` says that it is a gray or RGB JPEG that is not to be rotated.

    Raises
    ------
    DamagedImage
        If it is no image, cut short, or larger than ``MAX_PIXELS``; damage that only decoding
        finds raises it later.
    """

    def __init__(self, data: bytes, name: str = "image") -> None:
        self.data, self.name = data, name
        if not data:
            raise DamagedImage(name, "the file is empty")
        with wrap_decode_errors(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = io.BytesIO(data)
            self._image: Any = _open(stream)
            pixels_at = stream.tell()
            self.width, self.height = self._image.size
            # before anything that may decode: a small file can hold gigabytes of one color
            if self.width * self.height > MAX_PIXELS:
                raise ValueError(
                    f"{self.width}x{self.height} pixels are more than the limit of {MAX_PIXELS}"
                )
            kind = self._image.format
            if kind in ("JPEG", "MPO") and data.rfind(_END_OF_IMAGE, pixels_at) < 0:
                raise ValueError("the JPEG is cut short: it has no end marker")
            if kind == "PNG":
                self._image.load()  # its Exif data may follow the pixels
            orientation = _orientation(self._image)
        self._is_upright = orientation not in range(2, 9)
        self.is_ordinary_jpeg = (
            kind == "JPEG" and self._is_upright and self._image.mode in ("L", "RGB")
        )
        if orientation in (5, 6, 7, 8):
            self.width, self.height = self.height, self.width

    def decode(self) -> Tensor:
        """All pixels: uint8 (3, height, width), RGB.

        Gray and CMYK become RGB; 16 bits become 8; transparent pixels are laid on white; an
        animation gives its first frame; the rotation that Exif data ask for is made.
        """
        with wrap_decode_errors(self.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode_jpeg = _torchcodec() if self.is_ordinary_jpeg else None
            if decode_jpeg is not None:
                pixels = decode_jpeg(self.data)
            else:
                pixels = _with_pil(self._image, self._is_upright)
            if pixels.shape != (3, self.height, self.width):
                height, width = pixels.shape[1:]
                raise ValueError(
                    f"the header says {self.width}x{self.height} pixels, there are {width}x{height}"
                )
            return pixels

    def crop(self, box: Box, height: int, width: int) -> Tensor:
        """A part at another size, as :func:`resize` makes it: uint8 (3, height, width)."""
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        return resize(self.decode()[:, rows, columns], height, width)

    def resize_shorter(self, side: int) -> Tensor:
        """The whole image with its shorter side that many pixels long: uint8 (3, H, W), RGB."""
        height, width = self.size_with_shorter(side)
        return resize(self.decode(), height, width)

    def size_with_shorter(self, side: int) -> tuple[int, int]:
        """Height and width with the shorter side that long, rounded down as torchvision does.

        More than ``MAX_PIXELS``, as for a line of pixels, are refused as a ``DamagedImage``.
        """
        shorter = min(self.width, self.height)
        height, width = self.height * side // shorter, self.width * side // shorter
        if height * width > MAX_PIXELS:
            raise DamagedImage(
                self.name,
                f"{self.width}x{self.height} pixels would become {width}x{height}, more than the "
                f"limit of {MAX_PIXELS}",
            )
        return height, width


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) at another size, interpolated bilinearly with antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]


def _open(stream: io.BytesIO) -> Any:
    """PIL's image, not yet decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        raise ValueError("no image of a known kind") from None


def _orientation(image: Any) -> Any:
    """The Exif orientation, 1 if there is none; damaged Exif data do not damage the pixels."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def _with_pil(image: Any, is_upright: bool) -> Tensor:
    from PIL import ImageOps

    image.load()
    if not is_upright:
        image = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)


def _rgb(image: Any) -> Any:
    """An image of PIL in any mode as RGB."""
    from PIL import Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # PIL would cut 16 bits off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit values from {values.min()} to {values.max()} have no scale")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values have no scale that says what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
