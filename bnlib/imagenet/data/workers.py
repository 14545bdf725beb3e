"""Processes that prepare mini-batches, and what they hand over."""

from __future__ import annotations

import atexit
import logging
import signal
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnlib.imagenet.data.batch_decode import Part
from bnlib.imagenet.data.decode import DamagedImage, Encoded, decoder
from bnlib.imagenet.data.source import Source

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


class _Returning(Dataset[Prepared | DamagedImage]):
    """Returns a damaged image as a value: raised, it would reach the main process as another error,
    without its name."""

    def __init__(self, dataset: Dataset[Prepared]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: int) -> Prepared | DamagedImage:
        try:
            return self.dataset[item]
        except DamagedImage as error:
            return error


class Workers:
    """What the workers prepare, item after item, and the end of the workers.

    They end with this object, or before the process does: multiprocessing's own way of ending them
    at that point is a signal, which they ignore, so that the process would wait for them forever.
    """

    def __init__(
        self, dataset: Dataset[Prepared], items: Iterable[int], workers: int, device: torch.device
    ) -> None:
        loader = DataLoader(
            _Returning(dataset),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=device.type == "cuda",
            # its own: a loader must not draw from the generator that initializes and drops out
            generator=torch.Generator(),
        )
        self._iterator = iter(loader)
        end = weakref.finalize(self, _end, self._iterator)
        # Before torch notes that Python ends, after which it leaves the workers alone.
        end.atexit = False
        atexit.register(end)

    def __next__(self) -> Prepared:
        prepared: Prepared | DamagedImage = next(self._iterator)
        if isinstance(prepared, DamagedImage):
            raise prepared
        return prepared


def _end(iterator: Any) -> None:
    # What torch does when nothing refers to the iterator; but the trace of an error may do so.
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


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
