"""Mini-batches for training, made by worker processes.

The mini-batch of a step is a function of the recipe, the data set and the step alone. Workers make
whole mini-batches in turn, so that their number changes nothing, and a run that resumes at a step
sees the mini-batches that it would have seen. They hand over pixels as uint8; the photometric
distortions and the normalization are done where the network is, a mini-batch at a time. Where that
is a GPU, photographs can be decoded there too: :mod:`bnlib.imagenet.data.batch_decode`.

Images are RGB, (x / 255 - mean) / std with ImageNet's usual mean and deviation per channel:
:func:`bnlib.imagenet.data.augment.normalize`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnlib.imagenet.data import augment, batch_decode
from bnlib.imagenet.data.augment import Box
from bnlib.imagenet.data.batch_decode import Part
from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.order import Order, local_positions, steps_per_epoch
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.data.workers import Counting, Prepared, Workers, floating, read_example
from bnlib.imagenet.recipes import Recipe

__all__ = ["Batches", "batches", "steps_per_epoch"]

_LOGGER = logging.getLogger(__name__)
PATIENCE = 100  # unreadable images in a row, after which the data set is not worth training on


class _Example(NamedTuple):
    pixels: Tensor | tuple[bytes, Box]
    label: int
    drawn: augment.Augmentation


class _Batches(Dataset[Prepared]):
    """From the number of a step to its mini-batch (of one process)."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        rank: int,
        world: int,
        skip_damaged: bool,
        decodes: bool,
    ) -> None:
        self.source, self.recipe, self.skip_damaged = source, recipe, skip_damaged
        self.rank, self.world, self.decodes = rank, world, decodes
        self.per_epoch = steps_per_epoch(len(source), recipe.batch_size)
        self.size = len(local_positions(0, recipe.batch_size, rank, world))
        self.order = Order(len(source), recipe.seed, recipe.shards, recipe.within_shard_shuffling)
        self.epoch, self.indices = -1, np.empty(0, dtype=np.int64)
        self.known: dict[int, DamagedImage] = {}

    def __getitem__(self, step: int) -> Prepared:
        return self.prepare(step, range(self.size))

    def prepare(self, step: int, places: Sequence[int]) -> Prepared:
        """The examples at some places of the mini-batch of a step."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.indices = epoch, self.order.indices(epoch)
        positions = local_positions(batch, self.recipe.batch_size, self.rank, self.world)
        damaged: dict[str, str] = {}
        examples = [self._readable(positions[place], damaged) for place in places]
        parts, crops = [], []
        for place, (pixels, _, drawn) in zip(places, examples, strict=True):
            if isinstance(pixels, Tensor):
                crops.append(pixels.flip(-1) if drawn.flip else pixels)
            else:
                parts.append(Part(place, *pixels, drawn.flip))
        size = self.recipe.image_size
        # channels last, as pixels come from the decoder
        images = torch.empty(len(crops), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for image, crop in zip(images, crops, strict=True):
            image.copy_(crop)
        return Prepared(
            images,
            torch.tensor([example.label for example in examples]),
            torch.tensor([example.drawn.order for example in examples]),
            torch.tensor([example.drawn.factors for example in examples], dtype=torch.float32),
            damaged,
            parts,
        )

    def _readable(self, position: int, damaged: dict[str, str]) -> _Example:
        """The example at a position of the epoch, or the next one that can be read."""
        for attempt in range(min(PATIENCE, len(self.source))):
            index = int(self.indices[(position + attempt) % len(self.source)])
            try:
                if index in self.known:
                    raise self.known[index]
                return self._augmented(index)
            except DamagedImage as error:
                if not self.skip_damaged:
                    raise
                self.known[index] = error
                damaged[error.name] = error.reason
        raise DamagedImage(
            self.source.location,
            f"{len(damaged)} images in a row cannot be read, such as {next(iter(damaged.items()))}",
        )

    def _augmented(self, index: int) -> _Example:
        recipe = self.recipe
        encoded, label = read_example(self.source, index)
        drawn = augment.draw(
            encoded.width,
            encoded.height,
            seed=recipe.seed,
            epoch=self.epoch,
            index=index,
            photometric=recipe.photometric,
            min_area=recipe.min_area,
            max_aspect=recipe.max_aspect,
        )
        part = None if self.decodes else batch_decode.part_for_device(encoded, drawn.box)
        return _Example(part or encoded.crop(drawn.box, recipe.image_size), label, drawn)


class Batches(Counting, Iterator[tuple[int, Tensor, Tensor]]):
    """What :func:`batches` returns.

    Attributes
    ----------
    damaged
        The images that could not be read so far: from name to reason.
    steps_per_epoch
        Steps that make one pass over the source.
    """

    def __init__(
        self,
        dataset: _Batches,
        start_step: int,
        workers: int,
        device: torch.device,
        spare: _Batches | None,
    ) -> None:
        super().__init__(dataset.source)
        self.steps_per_epoch = dataset.per_epoch
        self._device, self._photometric = device, dataset.recipe.photometric > 0
        self._spare, self._has_refused = spare, False
        decodes = spare is not None and device.type == "cuda"
        self._aside = torch.cuda.Stream(device) if decodes else None
        self._steps = itertools.count(start_step)
        self._workers = Workers(dataset, itertools.count(start_step), workers, device)

    def __next__(self) -> tuple[int, Tensor, Tensor]:
        prepared = next(self._workers)
        step = next(self._steps)
        self.count(prepared.damaged)
        if self._spare is not None:
            # beside the step before, which a GPU may not have finished
            with torch.cuda.stream(self._aside):
                prepared = self._decoded(prepared, step, self._spare)
            if self._aside is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_stream(self._aside)
                prepared.images.record_stream(stream)  # its memory is not free before
        images = floating(prepared.images, self._device)
        if self._photometric:
            order = prepared.order.to(self._device, non_blocking=True)
            factors = prepared.factors.to(self._device, non_blocking=True)
            images = augment.distort(images, order, factors)
        labels = prepared.labels.to(self._device, non_blocking=True)
        return step, augment.normalize(images), labels

    def _decoded(self, prepared: Prepared, step: int, spare: _Batches) -> Prepared:
        """The same with all images, on the device."""
        count, size = len(prepared.labels), spare.recipe.image_size
        images = torch.empty(count, 3, size, size, dtype=torch.uint8, device=self._device)
        places = {part.place for part in prepared.parts}
        finished = [place for place in range(count) if place not in places]
        images[finished] = prepared.images.to(self._device)
        refused = batch_decode.fill(images, prepared.parts)
        if refused:
            if not self._has_refused:
                self._has_refused = True
                _LOGGER.warning(
                    "%d of the photographs of step %d cannot be decoded on %s (%s); these and "
                    "later ones are tried on the CPU",
                    len(refused),
                    step,
                    self._device,
                    next(iter(refused.values())),
                )
            # as if nothing had been decoded on a device: another example only if the CPU fails too
            again = spare.prepare(step, list(refused))
            self.count(again.damaged)
            images[list(refused)] = again.images.to(self._device)
            # labels, orders and factors
            for mine, other in zip(prepared[1:4], again[1:4], strict=True):
                mine[list(refused)] = other
        return prepared._replace(images=images)


def batches(
    source: Source,
    recipe: Recipe,
    *,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    skip_damaged: bool = True,
    decode: str = "auto",
) -> Batches:
    """Training mini-batches forever, epoch after epoch, from a step on.

    Parameters
    ----------
    source
        The images.
    recipe
        Its ``batch_size``, ``image_size``, ``seed``, shuffling and augmentation fields apply.
    start_step
        The first step.
    rank, world
        This process and the number of processes that share every mini-batch.
    workers
        Processes that prepare mini-batches; 0 prepares them in this one. Changes no mini-batch.
    device
        Where the mini-batches shall be.
    skip_damaged
        Whether an image that cannot be read is replaced by the next in the epoch's order that can;
        else it is an error.
    decode
        Where ordinary photographs are decoded: "cpu", in the workers; "gpu", on the device, a
        mini-batch at a time; "auto": on the device if it is a GPU and TorchCodec decodes there. The
        examples and their order are the same, pixels nearly. The form on a GPU has not been run
        yet; see :mod:`bnlib.imagenet.data.batch_decode`.

    Returns
    -------
    Batches
        An iterator of (step, images, labels): int; float32 (n, 3, S, S), normalized; int64 (n,);
        with n the recipe's ``batch_size`` divided by ``world``.

    Raises
    ------
    ValueError
        If a mini-batch has more examples than the source or cannot be divided among the processes,
        or ``decode`` is "gpu" where that does not work.
    DamagedImage
        While iterating: if an image cannot be read and ``skip_damaged`` is off, or a hundred in a
        row cannot.
    """
    if start_step < 0 or workers < 0:
        raise ValueError(
            f"start_step is {start_step} and workers {workers}; they must be at least 0"
        )
    if len(source.classes) > recipe.num_classes:
        raise ValueError(
            f"{source.location} has {len(source.classes)} classes, the recipe "
            f"{recipe.num_classes}; set --num-classes {len(source.classes)}"
        )
    device = torch.device(device)
    dataset = _Batches(source, recipe, rank, world, skip_damaged, decodes=True)
    if not batch_decode.is_chosen(decode, device):
        return Batches(dataset, start_step, workers, device, None)
    # Two: what one finds damaged must not change what the other hands over
    reading = _Batches(source, recipe, rank, world, skip_damaged, decodes=False)
    return Batches(reading, start_step, workers, device, dataset)
