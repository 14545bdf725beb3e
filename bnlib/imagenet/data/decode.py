"""From the bytes of an image file to pixels: right, or an error that names the file.

Photographs come as JPEG, mostly, and are decoded by TorchCodec where it works, else by PIL.
Everything else is PIL's: other formats, whatever the file's name says, print colors, photographs
that a camera held upright and marked so. Where only a small picture is wanted, less is decoded:

* PIL decodes a JPEG at a half, a quarter or an eighth of its size in less time, as libjpeg computes
  only the coarse part of the transform; this is used where the crop then still is at least as large
  as the picture wanted;
* files with restart markers, as :mod:`bnlib.imagenet.data.pack` writes them, are decoded only in the
  rows that the crop needs.

What no decoder notices is beyond this module: bits that have changed in the middle of a JPEG, so
that it still is one. The packed form has checksums for that.
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

from bnlib.imagenet.data import jpeg
from bnlib.imagenet.data.augment import Box

__all__ = ["MAX_PIXELS", "DamagedImage", "Encoded", "decode", "decoder", "is_ordinary"]

_LOGGER = logging.getLogger(__name__)
MAX_PIXELS = 178_956_970  # where PIL sees an attack: half a gigabyte of pixels
_ORIENTATION = 0x0112  # the Exif tag


class DamagedImage(ValueError):  # noqa: N818  (what it is, not that it is an error)
    """An image that cannot be decoded.

    Attributes
    ----------
    name
        Of the file or record.
    reason
        What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@lru_cache(maxsize=1)
def _torchcodec() -> Callable[[bytes], Tensor] | None:
    """TorchCodec's JPEG decoder, if it is there and works with this torch."""
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    try:
        decode_jpeg: Any = import_module("torchcodec.decoders").decode_jpeg
        decode_jpeg(picture.getvalue())
    except Exception as error:  # a library made for another torch fails in many ways
        _LOGGER.info("photographs are decoded by PIL (TorchCodec: %s)", error)
        return None
    _LOGGER.info(
        "photographs are decoded by TorchCodec %s, other images by PIL",
        metadata.version("torchcodec"),
    )
    return lambda data: decode_jpeg(data)


def decoder() -> str:
    """What decodes photographs here, "TorchCodec" or "PIL"; says so once, in the log."""
    return "TorchCodec" if _torchcodec() else "PIL"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an error that names the image."""
    try:
        yield
    except (DamagedImage, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly everything on damaged input
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedImage(name, reason) from error


class Encoded:
    """An image file in memory: its size at once, its pixels when asked for.

    Parameters
    ----------
    data
        The whole file. What it is, is read from its content, not from its name.
    name
        For errors.
    max_pixels
        More pixels than this are refused.

    Attributes
    ----------
    width
        Pixels, as people look at the image: after the turn that its Exif data asks for.
    height
        Likewise.

    Raises
    ------
    DamagedImage
        If it is no image, cut short, or larger than ``max_pixels``; pixels that turn out to be
        damaged raise it later.
    """

    def __init__(self, data: bytes, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> None:
        self.data, self.name = data, name
        self._header: jpeg.Header | None = None
        self._image: Any = None
        if not data:
            raise DamagedImage(name, "the file is empty")
        header = jpeg.read_header(data)
        if header and not jpeg.is_complete(data, header):
            raise DamagedImage(name, "the JPEG is cut short: it has no end marker")
        with _naming(name):
            if header and header.components != 4 and _upright(header.exif):
                self._header = header
                self.width, self.height = header.width, header.height
            else:
                self._image = _open(data)
                self.width, self.height = self._image.size
                if self._image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                    self.width, self.height = self.height, self.width
        if self.width * self.height > max_pixels:
            raise DamagedImage(
                name, f"{self.width}x{self.height} pixels are more than the limit of {max_pixels}"
            )

    def decode(self) -> Tensor:
        """All pixels: uint8 (3, height, width), RGB.

        Raises
        ------
        DamagedImage
            If they cannot be decoded.
        """
        return self._pixels(Box(0, 0, self.width, self.height))

    def crop(self, box: Box, size: int | tuple[int, int]) -> Tensor:
        """A part of the image at another size, interpolated bilinearly with antialiasing.

        Parameters
        ----------
        box
            The part.
        size
            Height and width of the result, pixels.

        Returns
        -------
        torch.Tensor
            uint8 (3, height, width), RGB.

        Raises
        ------
        DamagedImage
            If the pixels cannot be decoded.
        """
        height, width = (size, size) if isinstance(size, int) else size
        spare = min(box.width // width, box.height // height)
        if self._header is not None and spare >= 2:
            return self._reduced(box, height, width, max(s for s in (2, 4, 8) if s <= spare))
        pixels = self._pixels(box)[None]
        if pixels.shape[2:] != (height, width):
            pixels = interpolate(
                pixels.contiguous(memory_format=torch.channels_last),
                (height, width),
                mode="bilinear",
                antialias=True,
            )
        return pixels[0]

    def resize_shorter(self, side: int) -> Tensor:
        """The whole image with its shorter side so many pixels long: uint8 (3, H, W), RGB.

        Raises
        ------
        DamagedImage
            If the pixels cannot be decoded, or would be too many.
        """
        return self.crop(Box(0, 0, self.width, self.height), self.size_with_shorter(side))

    def size_with_shorter(self, side: int) -> tuple[int, int]:
        """Height and width with the shorter side so long, rounded down as torchvision does.

        Raises
        ------
        DamagedImage
            If that is more than ``MAX_PIXELS``, as for a line of pixels.
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

    def ordinary_jpeg(self, box: Box) -> tuple[bytes, Box] | None:
        """A JPEG that shows at least a part, for any decoder of JPEGs, and the part's place in it.

        None if the image is none, is to be turned, or has colors that not every decoder knows.
        """
        if self._header is None or self._header.rgb:
            return None
        return self._band(self._header, box)

    def _band(self, header: jpeg.Header, box: Box) -> tuple[bytes, Box]:
        data, first = jpeg.band(self.data, header, box.top, box.top + box.height)
        return data, box._replace(top=box.top - first)

    def _pixels(self, box: Box) -> Tensor:
        """The pixels of a part: uint8 (3, H, W), RGB."""
        with _naming(self.name):
            if self._header is None:
                return _tensor(_rgb(_turned(self._image)).crop(_corners(box)))
            data, box = self._band(self._header, box)
            decode_jpeg = _torchcodec()
            if decode_jpeg is None:
                return _tensor(_rgb(_open(data)).crop(_corners(box)))
            left, top, right, bottom = _corners(box)
            return decode_jpeg(data)[:, top:bottom, left:right]

    def _reduced(self, box: Box, height: int, width: int, scale: int) -> Tensor:
        """A part of a JPEG at another size, decoded at 1 / ``scale`` of its own."""
        assert self._header is not None
        with _naming(self.name):
            data, box = self._band(self._header, box)
            image = _open(data)
            image.draft("RGB", (image.width // scale, image.height // scale))
            part = tuple(corner / scale for corner in _corners(box))
            return _tensor(_rgb(image).resize((width, height), 2, part))  # 2: bilinear


def is_ordinary(data: bytes) -> bool:
    """Whether the data are a JPEG in gray or color that is not to be turned."""
    header = jpeg.read_header(data)
    return header is not None and header.components != 4 and _upright(header.exif)


def decode(data: bytes, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The pixels of an image file.

    Gray and print colors become RGB; 16 bits become 8; what is transparent lies on white; an
    animation gives its first picture; the turn that Exif data asks for is made.

    Parameters
    ----------
    data
        The whole file.
    name
        For errors.
    max_pixels
        More pixels than this are refused.

    Returns
    -------
    torch.Tensor
        uint8 (3, H, W), RGB.

    Raises
    ------
    DamagedImage
        If the image cannot be decoded.
    """
    return Encoded(data, name, max_pixels=max_pixels).decode()


def _corners(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _upright(exif: bytes | None) -> bool:
    """Whether the Exif data ask for no turn; what cannot be read asks for none."""
    if exif is None:
        return True
    from PIL import Image

    entries = Image.Exif()
    try:
        entries.load(exif)
        return entries.get(_ORIENTATION, 1) in (0, 1)
    except Exception:  # damaged Exif data do not damage the pixels
        return True


def _open(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # the limit here is max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("no image of a known kind") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _turned(image: Any) -> Any:
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        return ImageOps.exif_transpose(image)


def _rgb(image: Any) -> Any:
    """An image of PIL in any mode as RGB."""
    from PIL import Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # PIL would cut 16 bits off at 255
        values = np.asarray(image).astype(np.int64)
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
