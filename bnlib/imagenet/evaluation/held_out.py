"""Mini-batches for evaluation: the middle of every held-out photograph, once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.data.workers import Counting, Prepared, Workers, floating, read_example

__all__ = ["EvaluationBatches", "evaluation_batches"]


class _Centers(Dataset[Prepared]):
    """From indices to the middles of photographs."""

    def __init__(self, source: Source, size: int, resize: int, chunks: list[range]) -> None:
        self.source, self.size, self.resize, self.chunks = source, size, resize, chunks

    def __getitem__(self, number: int) -> Prepared:
        images, labels = [], []
        damaged: dict[str, str] = {}
        for index in self.chunks[number]:
            try:
                encoded, label = read_example(self.source, index)
                pixels = encoded.resize_shorter(self.resize)
            except DamagedImage as error:
                damaged[error.name] = error.reason
                continue
            height, width = pixels.shape[1:]
            top, left = round((height - self.size) / 2), round((width - self.size) / 2)
            images.append(pixels[:, top : top + self.size, left : left + self.size])
            labels.append(label)
        empty = torch.empty(0)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        return Prepared(stacked, torch.tensor(labels, dtype=torch.int64), empty, empty, damaged)


class EvaluationBatches(Counting, Iterator[tuple[Tensor, Tensor]]):
    """What :func:`evaluation_batches` returns.

    Attributes
    ----------
    damaged
        The images that could not be read so far: from name to reason.
    """

    def __init__(self, dataset: _Centers, workers: int, device: torch.device) -> None:
        super().__init__(dataset.source)
        self._device = device
        self._workers = Workers(dataset, range(len(dataset.chunks)), workers, device)

    def __next__(self) -> tuple[Tensor, Tensor]:
        while True:
            prepared = next(self._workers)
            self.count(prepared.damaged)
            if len(prepared.labels):
                break
        images = floating(prepared.images, self._device)
        return augment.normalize(images), prepared.labels.to(self._device, non_blocking=True)


def evaluation_batches(
    source: Source,
    size: int,
    resize: int,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> EvaluationBatches:
    """The middle of every photograph, once, in the source's order.

    Images that cannot be read are left out and counted. The last mini-batch may be smaller. Workers
    decode, whatever the device is: accuracy does not depend on where training decodes.

    Parameters
    ----------
    source
        The images.
    size
        Height and width of the crop, pixels.
    resize
        Length of the photograph's shorter side before, pixels; at least ``size``.
    batch_size
        Examples of a mini-batch of this process.
    rank, world
        This process takes every ``world``-th example from ``rank`` on.
    workers
        Processes that prepare mini-batches; 0 prepares them in this one.
    device
        Where the mini-batches shall be.

    Returns
    -------
    EvaluationBatches
        An iterator of (images, labels): float32 (n, 3, size, size), normalized as in training;
        int64 (n,).

    Raises
    ------
    ValueError
        If the crop is larger than the photograph will be, or another number is out of range.
    """
    if not 1 <= size <= resize or batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise ValueError(
            f"size {size} must be from 1 to resize {resize}, batch_size {batch_size} at least 1, "
            f"workers {workers} at least 0, rank {rank} from 0 to below world {world}"
        )
    mine = range(rank, len(source), world)
    chunks = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    return EvaluationBatches(_Centers(source, size, resize, chunks), workers, torch.device(device))
