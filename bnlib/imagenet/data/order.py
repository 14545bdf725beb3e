"""The order of the training examples: which example comes when, as a function of the seed.

Nothing here has a state, so a resumed run sees the batches that it would have seen.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

__all__ = ["Order", "generator", "local_positions", "steps_per_epoch"]

_LOGGER = logging.getLogger(__name__)
# What the random numbers are for; each purpose has streams of its own.
LAYOUT, EPOCH, AUGMENTATION = range(3)


def generator(seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """Random numbers that depend on the arguments alone.

    Philox (Salmon et al., 2011) computes its numbers from a key and a counter. Here the key is the
    seed and the upper words of the counter are the rest, so that streams never meet.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, epoch, index]))


class Order:
    """The order of the examples in every epoch, with the paper's two ways of shuffling.

    Large data sets are stored in shards: files of some thousand examples that are read from end to
    end. Which example is in which shard, and where in it, is drawn once, at random.

    Without within-shard shuffling an epoch visits the shards in a new order and reads each as it is
    stored: examples that are neighbors once are neighbors in every epoch, so that mostly the same
    ones meet in a mini-batch. With it the examples of a shard are shuffled too. Batch normalization
    makes an example's output depend on the others in its mini-batch, and gains from meeting new
    ones: about 1% in validation accuracy (section 4.2.1).
    """

    def __init__(self, n: int, seed: int, shards: int, within_shard_shuffling: bool) -> None:
        self.n, self.seed, self.shards = n, seed, min(shards, n)
        self.within_shard_shuffling = within_shard_shuffling
        if not within_shard_shuffling and self.shards > n // 2:
            _LOGGER.warning(
                "%d examples in %d shards: with one or two examples a shard, shuffling the shards "
                "shuffles everything; set fewer shards to see the effect of within-shard shuffling",
                n,
                self.shards,
            )
        self._layout = generator(seed, LAYOUT).permutation(n)

    def indices(self, epoch: int) -> NDArray[np.int64]:
        """The examples of an epoch in their order: a permutation of 0 to n - 1."""
        rng = generator(self.seed, EPOCH, epoch)
        parts = np.array_split(self._layout, self.shards)
        visited = [parts[shard] for shard in rng.permutation(self.shards)]
        if self.within_shard_shuffling:
            visited = [rng.permutation(part) for part in visited]
        return np.concatenate(visited).astype(np.int64, copy=False)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole mini-batches in an epoch; the examples that are left over are dropped."""
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"a mini-batch of {batch_size} cannot be made of {n} examples; set --batch-size to at "
            f"most {n}"
        )
    return n // batch_size


def local_positions(batch: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
    """Positions in the epoch's order of one process's part of a mini-batch.

    ``batch`` is the number of the mini-batch in its epoch, ``batch_size`` its examples over all
    ``world`` processes together.
    """
    if batch_size % world:
        raise ValueError(
            f"a mini-batch of {batch_size} cannot be divided equally among {world} processes; set "
            f"--batch-size to a multiple of {world}"
        )
    local = batch_size // world
    first = batch * batch_size + rank * local
    return range(first, first + local)
