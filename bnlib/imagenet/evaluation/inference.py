"""What networks say about held-out images: the one road that every evaluation takes.

The trainer, ``python -m bnlib evaluate`` and ``ensemble``, and recorded predictions all go through
:func:`predict`. Workers decode each image once, in full, and cut its crops; the main process
normalizes them and runs the networks in float32, whatever precision they were trained in.

An image's probabilities are the mean over its crops (section 4.2.3). They are computed from
log-probabilities, so that none underflows to zero:

.. math:: \\log p_k = \\log \\sum_v w_v \\exp \\log p_{v,k}

over its different crops :math:`v`, with :math:`w_v` the share of the crops that are equal to
:math:`v`. With one crop this is the network's log-softmax itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.data.workers import SkippedImages, Workers, read_example, to_float
from bnlib.imagenet.evaluation.crops import CROPS, cropped, views
from bnlib.imagenet.processes import Processes

__all__ = ["Predicted", "predict"]


class Predicted(NamedTuple):
    """What networks say about a few images, on the device."""

    log_probabilities: Tensor  #: float32 (networks, n, classes)
    labels: Tensor  #: int64 (n,)
    indices: Tensor  #: int64 (n,), which examples of the source they are


class _Crops(NamedTuple):
    """The crops of a few images, as a worker hands them over."""

    pixels: Tensor  # uint8 (different crops of all images, 3, size, size)
    shares: Tensor  # float32: the part of its image's crops that each stands for
    counts: Tensor  # int64 (n,): how many different crops each image has
    labels: Tensor
    indices: Tensor
    damaged: dict[str, str]


class _Cutting(Dataset[_Crops]):
    """From the number of a chunk of images to their crops."""

    def __init__(self, source: Source, size: int, crops: int, chunks: list[range]) -> None:
        self.source, self.size, self.crops, self.chunks = source, size, crops, chunks

    def __getitem__(self, number: int) -> _Crops:
        pixels, shares = list[Tensor](), list[float]()
        images = list[tuple[int, int, int]]()  # different crops, label, index
        damaged: dict[str, str] = {}
        for index in self.chunks[number]:
            try:
                encoded, label = read_example(self.source, index)
                wanted = views(encoded.width, encoded.height, self.size, self.crops)
                largest = max(view.shorter for view in wanted)
                encoded.size_with_shorter(largest)  # refuses what would become too long
                found = Counter(cropped(encoded.decode(), self.size, self.crops))
            except DamagedImage as error:
                damaged[error.name] = error.reason
                continue
            pixels += found
            shares += [occurrences / self.crops for occurrences in found.values()]
            images.append((len(found), label, index))
        counts, labels, indices = torch.tensor(images, dtype=torch.int64).view(-1, 3).unbind(1)
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        stacked = torch.stack(pixels) if pixels else empty
        return _Crops(stacked, torch.tensor(shares), counts, labels, indices, damaged)


def predict(
    networks: Sequence[nn.Module],
    source: Source,
    size: int,
    crops: int = 1,
    *,
    group: Processes,
    workers: int = 0,
    batch: int = 100,
    progress: bool = False,
) -> Iterator[Predicted]:
    """Class log-probabilities of this process's share of the images, a few images at a time.

    Every image is decoded once for all networks. The order is that of the source; images that
    cannot be read are left out, with a warning in the log.

    Parameters
    ----------
    networks
        In evaluation mode, on the device of ``group``.
    source
        The images; each process of the group takes every so many-th.
    size
        Height and width of a crop, pixels.
    crops
        Views of an image: 1, 10 or 144; see :mod:`bnlib.imagenet.evaluation.crops`.
    workers
        Processes that decode images and cut crops; 0 does that in this one. Changes no result.
    batch
        Crops that go through a network at once.

    Raises
    ------
    ValueError
        If a number is out of range, or a label is beyond the networks' classes.
    """
    if size < 1 or batch < 1 or workers < 0 or crops not in CROPS:
        raise ValueError(
            f"size {size} and batch {batch} must be at least 1, workers {workers} at least 0, "
            f"crops {crops} one of {CROPS}"
        )
    mine = range(group.rank, len(source), group.world)
    together = max(1, batch // crops)  # images
    chunks = [mine[first : first + together] for first in range(0, len(mine), together)]
    skipped = SkippedImages(source)
    cutting = Workers(
        _Cutting(source, size, crops, chunks), range(len(chunks)), workers, group.device
    )
    with tqdm(total=len(mine), unit="img", disable=None if progress else True) as bar:
        for chunk in chunks:
            found: _Crops = next(cutting)
            skipped.count(found.damaged)
            if len(found.labels):
                logs = torch.stack([_forward(network, found, group, batch) for network in networks])
                if found.labels.max() >= logs.shape[2]:
                    raise ValueError(
                        f"{source.location} has {len(source.classes)} classes, the network "
                        f"{logs.shape[2]}; evaluate on the data set that it was trained on"
                    )
                labels, indices = found.labels.to(group.device), found.indices.to(group.device)
                yield Predicted(logs, labels, indices)
            bar.update(len(chunk))


@torch.no_grad()
def _forward(network: nn.Module, found: _Crops, group: Processes, batch: int) -> Tensor:
    """A network's log-probabilities of images, (n, classes)."""
    logs = []
    for pixels in found.pixels.split(batch):
        images = augment.normalize(to_float(pixels, group.device))
        with torch.autocast(group.device.type, enabled=False):
            logits = network(images.to(memory_format=torch.channels_last))
        logs.append(logits.float().log_softmax(1))
    weighted = torch.cat(logs) + found.shares.to(group.device).log()[:, None]
    each = weighted.split(found.counts.tolist())
    # (most crops of an image, n, classes); what an image has fewer counts nothing
    return pad_sequence(list(each), padding_value=-torch.inf).logsumexp(0)
