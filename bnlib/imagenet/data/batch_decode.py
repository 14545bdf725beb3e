"""The photographs of a mini-batch decoded together, on the device where the network is.

Workers then only read files, check them and draw the augmentation; nvJPEG, through TorchCodec,
decodes the ordinary JPEGs of a mini-batch in one call, and cropping and resizing follow on the same
device. Everything else is decoded by the workers as before: see :mod:`bnlib.imagenet.data.decode`.

The CUDA form has not been run yet: nothing here has been tested on a GPU, only the same code with
TorchCodec's decoder for the CPU, which takes the same arguments. Before the first mini-batch a test
picture is decoded on the device; what does not come out right is left to the workers. What is
traded, as far as one can read it from the libraries:

* Pixels differ from those of the CPU by a gray level: interpolation is in float32, not in whole
  numbers. They differ more, on average by about one level, in crops at least twice as large as the
  picture wanted, which workers decode at a reduced size; and by what nvJPEG's own arithmetic adds,
  above all where a photograph stores its colors at half the resolution.
* The process that trains waits for the decoding once a step, in which its GPU can finish the step
  before: the loader decodes on a stream of its own.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bnlib.imagenet.data.augment import Box
from bnlib.imagenet.data.decode import Encoded, decoder

__all__ = ["CHOICES", "Part", "fill", "is_chosen", "part_for_device"]

_LOGGER = logging.getLogger(__name__)
CHOICES = ("auto", "cpu", "gpu")
DEVICES = ("cuda",)  # the kinds of devices that have a decoder for batches
WRONG = 4  # gray levels that a smooth test picture may be off by, on average
MOST_PIXELS = 1 << 24  # larger photographs would take the network's memory; workers decode them


class Part(NamedTuple):
    """A part of a photograph that is still to be decoded.

    Attributes
    ----------
    place
        Where in the mini-batch it belongs.
    data
        An ordinary JPEG.
    box
        The part of it that is wanted.
    flip
        Whether it is mirrored.
    """

    place: int
    data: bytes
    box: Box
    flip: bool


def is_chosen(choice: str, device: torch.device) -> bool:
    """Whether mini-batches are decoded on a device; said once, in the log.

    Parameters
    ----------
    choice
        "cpu": never; "gpu": always; "auto": where the device is a GPU and TorchCodec decodes there.
    device
        Where the mini-batches shall be.

    Raises
    ------
    ValueError
        If the choice is "gpu" and that does not work here.
    """
    if choice not in CHOICES:
        raise ValueError(f"decode is {choice!r}; it must be one of {', '.join(CHOICES)}")
    if choice == "cpu":
        return False
    if device.type in DEVICES:
        obstacle = _obstacle(device)
    elif choice == "auto":
        return False
    else:
        obstacle = f"it is no {' or '.join(DEVICES)} device"
    if obstacle is not None and choice == "gpu":
        raise ValueError(
            f"decode is 'gpu', but photographs cannot be decoded on the device {device}: "
            f"{obstacle}; set decode to auto or cpu, or install TorchCodec with CUDA"
        )
    return obstacle is None


def part_for_device(encoded: Encoded, box: Box) -> tuple[bytes, Box] | None:
    """What a device needs to show a part of an image.

    Parameters
    ----------
    encoded
        The image, which has passed the checks of its own.
    box
        The part.

    Returns
    -------
    tuple or None
        A JPEG and the part's place in it; None for what the worker shall decode itself.
    """
    if encoded.width * encoded.height > MOST_PIXELS:
        return None
    return encoded.ordinary_jpeg(box)


def fill(images: Tensor, parts: Sequence[Part]) -> dict[int, str]:
    """Decode parts of photographs, each into its place in a mini-batch.

    Parts are resized bilinearly with antialiasing. If the device refuses them together, each is
    tried alone.

    Parameters
    ----------
    images
        uint8 (N, 3, S, S), RGB: the mini-batch, on the device that decodes; overwritten at the
        parts' places.
    parts
        What to decode.

    Returns
    -------
    dict
        From the places of those that the device does not decode to what it says about them; they
        may be damaged, or a decoder of another kind may know them.
    """
    if not parts:
        return {}
    device, size = images.device, images.shape[-1]
    if device.type == "cuda":
        # The GPU's unit for JPEGs keeps to no stream: it may write into memory that work still
        # waiting on this one reads. TorchCodec waits at the end in any case.
        torch.cuda.current_stream(device).synchronize()
    refused: dict[int, str] = {}
    decode_jpeg = _decode_jpeg()
    try:
        pictures = decode_jpeg([part.data for part in parts], device=device)
    except Exception:  # one is enough; the next lines find it
        pictures = [None] * len(parts)
    for part, picture in zip(parts, pictures, strict=True):
        try:
            if picture is None:
                (picture,) = decode_jpeg([part.data], device=device)
            images[part.place] = _shown(picture, part, size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # decoders raise nearly everything on damaged input
            refused[part.place] = " ".join(str(error).split()) or type(error).__name__
    return refused


def _shown(picture: Tensor, part: Part, size: int) -> Tensor:
    """The part of a picture at another size: float32 (3, S, S), whole numbers."""
    left, top, width, height = part.box
    pixels = picture.narrow(1, top, height).narrow(2, left, width)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    if (height, width) != (size, size):  # CUDA interpolates no whole numbers
        resized = interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)
        pixels = resized[0].round_()
    return pixels.flip(-1) if part.flip else pixels


def _decode_jpeg() -> Callable[..., Any]:
    decode_jpeg: Callable[..., Any] = import_module("torchcodec.decoders").decode_jpeg
    return decode_jpeg


@cache
def _obstacle(device: torch.device) -> str | None:
    """Why TorchCodec does not decode on a device; None if it does."""
    from PIL import Image

    decoder()  # says first what decodes the rest
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(64, 64)
    smooth = torch.stack([ramp, ramp.T, 255 - ramp], dim=-1)
    picture = io.BytesIO()
    Image.fromarray(smooth.numpy()).save(picture, "JPEG", quality=95)
    reason = None
    try:
        (found,) = _decode_jpeg()([picture.getvalue()], device=device)
        wrong = (found.cpu().float() - smooth.permute(2, 0, 1)).abs().mean().item()
        if wrong > WRONG:
            reason = f"a test picture is off by {wrong:.0f} gray levels on average"
    except Exception as error:  # a library made for another torch, or without CUDA, fails variously
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason is not None:
        _LOGGER.info("photographs are not decoded on %s (TorchCodec: %s)", device, reason)
        return reason
    _LOGGER.info(
        "but ordinary photographs to train on are decoded on %s, a mini-batch at a time", device
    )
    return None
