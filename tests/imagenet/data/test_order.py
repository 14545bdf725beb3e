"""The order of the examples is a function of seed and epoch alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bnlib.imagenet.data.order import Order, local_positions, steps_per_epoch


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch_alone() -> None:
    order = Order(100, seed=3, shards=7, within_shard_shuffling=True)
    late_first = [order.indices(epoch) for epoch in (5, 0, 1)]
    again = [Order(100, 3, 7, True).indices(epoch) for epoch in (5, 0, 1)]
    for ours, theirs in zip(late_first, again, strict=True):
        assert ours.dtype == np.int64
        assert sorted(ours) == list(range(100))
        np.testing.assert_array_equal(ours, theirs)
    assert (late_first[1] != late_first[2]).any()
    assert (Order(100, 4, 7, True).indices(0) != late_first[1]).any()


def neighbors(indices: np.ndarray) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in itertools.pairwise(indices)}


def test_without_within_shard_shuffling_the_same_examples_stay_together() -> None:
    n, shards = 120, 6
    fixed = Order(n, 0, shards, within_shard_shuffling=False)
    kept = neighbors(fixed.indices(0)) & neighbors(fixed.indices(1))
    assert len(kept) >= n - shards
    assert (fixed.indices(0) != fixed.indices(1)).any(), "the shards themselves are shuffled"


def test_with_within_shard_shuffling_only_the_shards_stay_together() -> None:
    n, shards = 120, 6
    shuffled = Order(n, 0, shards, within_shard_shuffling=True)
    first, second = shuffled.indices(0), shuffled.indices(1)
    assert len(neighbors(first) & neighbors(second)) < n // 10
    parts = [{frozenset(part) for part in np.split(indices, shards)} for indices in (first, second)]
    assert parts[0] == parts[1]


def test_examples_are_spread_over_the_shards_at_random() -> None:
    indices = Order(1000, 0, 10, within_shard_shuffling=False).indices(0)
    assert all(np.ptp(part) > 500 for part in np.split(indices, 10))


def test_shards_of_one_example_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert len(Order(5, 0, 1024, within_shard_shuffling=False).indices(0)) == 5
    assert "fewer shards" in caplog.text


def test_the_processes_parts_of_the_batches_are_disjoint_and_make_the_whole() -> None:
    n, batch_size, world = 103, 12, 3
    seen = [
        position
        for batch in range(steps_per_epoch(n, batch_size))
        for rank in range(world)
        for position in local_positions(batch, batch_size, rank, world)
    ]
    assert seen == list(range(96))


def test_a_batch_that_cannot_be_divided_or_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        local_positions(0, 32, 0, 3)
    with pytest.raises(ValueError, match="at most 5"):
        steps_per_epoch(5, 32)
