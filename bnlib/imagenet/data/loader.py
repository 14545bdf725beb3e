"""Mini-batches for training, made by worker processes.

The mini-batch of a step is a function of the recipe, the data set and the step alone. Workers make
whole mini-batches in turn, so that their number changes nothing, and a run that resumes at a step
sees the mini-batches that it would have seen. They return pixels as uint8; the photometric
distortions and the normalization are done where the network is, a mini-batch at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.order import Order, local_positions, steps_per_epoch
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.data.workers import Batch, SkippedImages, Workers, read_example, to_float
from bnlib.imagenet.recipes import Recipe

__all__ = ["Batches", "batches"]

MAX_CONSECUTIVE_FAILURES = 100  # unreadable images in a row, after which training ends


class _Batches(Dataset[Batch]):
    """From the number of a step to its mini-batch (of one process)."""

    def __init__(self, source: Source, recipe: Recipe, rank: int, world: int) -> None:
        self.source, self.recipe, self.rank, self.world = source, recipe, rank, world
        self.per_epoch = steps_per_epoch(len(source), recipe.batch_size)
        local_positions(0, recipe.batch_size, rank, world)  # refuses what cannot be divided
        self.order = Order(len(source), recipe.seed, recipe.shards, recipe.within_shard_shuffling)
        self.epoch, self.indices = -1, np.empty(0, dtype=np.int64)
        self.known_damaged: dict[int, DamagedImage] = {}

    def __getitem__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.indices = epoch, self.order.indices(epoch)
        positions = local_positions(batch, self.recipe.batch_size, self.rank, self.world)
        size = self.recipe.image_size
        # channels last, as pixels come from the decoder
        images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels: list[int] = []
        drawn: list[augment.Augmentation] = []
        damaged: dict[str, str] = {}
        for image, position in zip(images, positions, strict=True):
            crop, label, augmentation = self._readable(position, damaged)
            image.copy_(crop.flip(-1) if augmentation.flip else crop)
            labels.append(label)
            drawn.append(augmentation)
        return Batch(
            images,
            torch.tensor(labels),
            torch.tensor([augmentation.order for augmentation in drawn]),
            torch.tensor([augmentation.factors for augmentation in drawn], dtype=torch.float32),
            damaged,
        )

    def _readable(
        self, position: int, damaged: dict[str, str]
    ) -> tuple[Tensor, int, augment.Augmentation]:
        """The example at a position of the epoch, or the next one that can be read."""
        for attempt in range(min(MAX_CONSECUTIVE_FAILURES, len(self.source))):
            index = int(self.indices[(position + attempt) % len(self.source)])
            try:
                if index in self.known_damaged:
                    raise self.known_damaged[index]
                return self._cropped(index)
            except DamagedImage as error:
                self.known_damaged[index] = error
                damaged[error.name] = error.reason
        raise DamagedImage(
            self.source.location,
            f"{len(damaged)} images in a row cannot be read, such as {next(iter(damaged.items()))}",
        )

    def _cropped(self, index: int) -> tuple[Tensor, int, augment.Augmentation]:
        """An example's crop, label and augmentation in the current epoch."""
        recipe = self.recipe
        encoded, label = read_example(self.source, index)
        augmentation = augment.draw(
            encoded.width, encoded.height, recipe, epoch=self.epoch, index=index
        )
        crop = encoded.crop(augmentation.box, recipe.image_size, recipe.image_size)
        return crop, label, augmentation


class Batches(SkippedImages, Iterator[tuple[int, Tensor, Tensor]]):
    """What :func:`batches` returns; ``damaged`` holds the images that could not be read so far."""

    def __init__(
        self, dataset: _Batches, start_step: int, workers: int, device: torch.device
    ) -> None:
        super().__init__(dataset.source)
        self.steps_per_epoch = dataset.per_epoch
        self._device, self._photometric = device, dataset.recipe.photometric > 0
        self._steps = itertools.count(start_step)
        self._workers = Workers(dataset, itertools.count(start_step), workers, device)

    def __next__(self) -> tuple[int, Tensor, Tensor]:
        batch = next(self._workers)
        self.count(batch.damaged)
        images = to_float(batch.images, self._device)
        if self._photometric:
            order = batch.order.to(self._device, non_blocking=True)
            factors = batch.factors.to(self._device, non_blocking=True)
            images = augment.distort(images, order, factors)
        labels = batch.labels.to(self._device, non_blocking=True)
        return next(self._steps), augment.normalize(images), labels


def batches(
    source: Source,
    recipe: Recipe,
    *,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Batches:
    """Training mini-batches without end, epoch after epoch, from a step on.

    An iterator of (step, images, labels): int; float32 (n, 3, S, S), normalized; int64 (n,); with
    n the recipe's ``batch_size`` divided by the ``world`` of processes that share every mini-batch.
    ``workers`` processes prepare them; 0 prepares them in this one; the number changes none. An
    image that cannot be read is replaced by the next readable one in the epoch's order.

    Raises
    ------
    ValueError
        If a mini-batch has more examples than the source or cannot be divided among the processes,
        or the source has more classes than the recipe.
    DamagedImage
        While iterating: if a hundred images in a row cannot be read.
    """
    if len(source.classes) > recipe.num_classes:
        raise ValueError(
            f"{source.location} has {len(source.classes)} classes, the recipe "
            f"{recipe.num_classes}; set --num-classes {len(source.classes)}"
        )
    dataset = _Batches(source, recipe, rank, world)
    return Batches(dataset, start_step, workers, torch.device(device))
