"""Processes that prepare mini-batches, and what they hand over."""

from __future__ import annotations

import logging
import signal
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnlib.imagenet.batch_decode import Part
from bnlib.imagenet.decode import DamagedImage, Encoded, decoder
from bnlib.imagenet.examples import Source

__all__ = ["Counting", "Prepared", "Workers", "floating", "read_example"]

_LOGGER = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """What a worker hands over: tensors, and what it found damaged."""

    images: Tensor  # without the parts
    labels: Tensor
    order: Tensor
    factors: Tensor
    damaged: dict[str, str]
    parts: Sequence[Part] = ()  # what is still to be decoded


def read_example(source: Source, index: int) -> tuple[Encoded, int]:
    """An example's image and label; an image that cannot be read is a damaged one."""
    try:
        data, label, name = source[index]
    except OSError as error:
        raise DamagedImage(
            source.name(index), f"cannot be read: {error.strerror or error}"
        ) from error
    return Encoded(data, name), label


def _start_worker(_: int) -> None:
    # The main process alone decides what a signal means; workers end when it tells them to, as
    # Workers sees to, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Workers:
    """What the workers prepare, item after item, and the end of the workers.

    They end with this object, or before the process does: multiprocessing's own way of ending them
    at that point is a signal, which they ignore.
    """

    def __init__(
        self, dataset: Dataset[Prepared], items: Iterable[int], workers: int, device: torch.device
    ) -> None:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=device.type == "cuda",
            # its own: a loader must not draw from the generator that initializes and drops out
            generator=torch.Generator(),
        )
        self._iterator = [iter(loader)]
        weakref.finalize(self, self._iterator.clear)

    def __next__(self) -> Prepared:
        prepared: Prepared = next(self._iterator[0])
        return prepared


def floating(images: Tensor, device: torch.device) -> Tensor:
    """Pixels as float32, still 0 to 255, on the device."""
    moved = images.to(device, non_blocking=True)
    return moved.to(torch.float32, memory_format=torch.contiguous_format)


class Counting:
    """Iterators that gather the damaged images that workers report."""

    def __init__(self, source: Source) -> None:
        self.damaged: dict[str, str] = {}
        self._location = source.location
        decoder()  # says once, here and not in every worker, what decodes

    def count(self, found: dict[str, str]) -> None:
        """Add what a worker found, with a warning for each image that is new."""
        for name, reason in found.items():
            if name not in self.damaged:
                self.damaged[name] = reason
                _LOGGER.warning(
                    "skipped a damaged image of %s (%d so far): %s: %s",
                    self._location,
                    len(self.damaged),
                    name,
                    reason,
                )
