"""Processes that prepare mini-batches, and what they return."""

from __future__ import annotations

import atexit
import logging
import signal
import weakref
from collections.abc import Iterable
from traceback import format_exc
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnlib.imagenet.data.decode import DamagedImage, Encoded, decoder
from bnlib.imagenet.data.source import Source, SourceError

__all__ = ["Batch", "SkippedImages", "Workers", "read_example", "to_float"]

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


class Batch(NamedTuple):
    """A mini-batch as a worker returns it."""

    images: Tensor  # uint8 (N, 3, H, W), RGB
    labels: Tensor  # int64 (N,)
    order: Tensor  # int64 (N, 3) and float32 (N, 3): as augment.distort takes them
    factors: Tensor
    damaged: dict[str, str]  # the images that could not be read: from name to reason


def read_example(source: Source, index: int) -> tuple[Encoded, int]:
    """An example's image and label; a file that cannot be read raises ``DamagedImage`` too."""
    try:
        data, label, name = source[index]
    except OSError as error:
        raise DamagedImage(
            source.name(index), f"cannot be read: {error.strerror or error}"
        ) from error
    return Encoded(data, name), label


def _start_worker(_: int) -> None:
    # The main process alone decides what a signal means; workers end when Workers ends them or the
    # main process is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Returning(Dataset[T | Exception]):
    """Returns what is wrong with images and disks as a value: raised in a worker, it would reach
    the main process as another error or with another message."""

    def __init__(self, dataset: Dataset[T]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: int) -> T | Exception:
        try:
            return self.dataset[item]
        except (DamagedImage, SourceError, OSError) as error:
            error.add_note(f"In the process that prepares item {item}:\n{format_exc()}")
            return error


class Workers(Generic[T]):
    """An iterator of what worker processes prepare, item after item; ends the processes.

    They end with this object, or before the process does: multiprocessing would end them with a
    signal then, which they ignore, and the process would wait for them forever.
    """

    def __init__(
        self, dataset: Dataset[T], items: Iterable[int], workers: int, device: torch.device
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

    def __next__(self) -> T:
        item: T | Exception = next(self._iterator)
        if isinstance(item, Exception):
            raise item
        return item


def _end(iterator: Any) -> None:
    # What torch does when nothing refers to the iterator; but the trace of an error may do so.
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Pixels as float32, still 0 to 255, on the device."""
    moved = images.to(device, non_blocking=True)
    return moved.to(torch.float32, memory_format=torch.contiguous_format)


class SkippedImages:
    """A base of iterators that collect the damaged images that workers report."""

    def __init__(self, source: Source) -> None:
        self.damaged: dict[str, str] = {}
        self._location = source.location
        decoder()  # logs what decodes once, here and not in every worker

    def count(self, found: dict[str, str]) -> None:
        """Add what a worker reports, with a warning for each new image."""
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
