"""Mini-batches are a function of the recipe, the data set and the step alone."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import SMALL, damage
from images import write_folder
from torch import Tensor

from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.order import Order

Batch = tuple[int, Tensor, Tensor]


def first(batches_: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches_, count))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for (step, images, labels), (step_, images_, labels_) in zip(ours, theirs, strict=True):
        assert step == step_
        assert torch.equal(images, images_)
        assert torch.equal(labels, labels_)


@pytest.mark.parametrize("form", ["folder", "packed"])
def test_the_batches_are_the_same_for_every_number_of_workers(
    form: str, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(form), "train")
    alone = first(batches(source, SMALL), 6)
    assert_same(first(batches(source, SMALL, workers=2), 6), alone)
    images, labels = alone[0][1:]
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert not torch.equal(alone[0][1], alone[4][1]), "another epoch, other crops"


def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = first(batches(source, SMALL), 11)
    assert [step for step, *_ in whole] == list(range(11))
    for start in (1, 4, 9):
        assert_same(first(batches(source, SMALL, start_step=start), 11 - start), whole[start:])


def test_two_processes_share_every_batch_exactly(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = first(batches(source, SMALL), 5)
    parts = [first(batches(source, SMALL, rank=rank, world=2), 5) for rank in (0, 1)]
    joined = [
        (a[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]]))
        for a, b in zip(*parts, strict=True)
    ]
    for ours, theirs in zip(joined, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_epoch_shows_every_example_with_its_label(folder: Path) -> None:
    source = open_source(folder, "train")
    whole = SMALL.replace(batch_size=9)
    labels = torch.cat([labels for _, _, labels in first(batches(source, whole), 4)])
    assert labels.bincount().tolist() == [12, 12, 12]
    assert (labels.diff() != 0).sum() > 10, "the classes are mixed"


def test_making_batches_draws_nothing_from_the_global_generators(folder: Path) -> None:
    source = open_source(folder, "train")
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    first(batches(source, SMALL, workers=1), 2)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_damaged_images_are_replaced_by_the_next_counted_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ruined = damage(folder, tmp_path / "copy")
    source, sound = open_source(tmp_path / "copy", "train"), open_source(folder, "train")
    whole = SMALL.replace(batch_size=9)
    made = batches(source, whole)
    got, expected = first(made, 8), first(batches(sound, whole), 8)
    assert made.damaged.keys() == ruined.keys()
    assert all(made.damaged.values())
    assert all(caplog.text.count(name) == 1 for name in ruined), "said once, not once an epoch"
    order = Order(36, whole.seed, whole.shards, True)
    names = [sound.name(int(i)) for epoch in (0, 1) for i in order.indices(epoch)]
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for i in range(9):
            position = 9 * step + i
            same = torch.equal(ours[1][i], theirs[1][i])
            if names[position] not in ruined:
                assert same
            elif position % 36 < 35 and names[position + 1] not in ruined:
                following = expected[step][1][i + 1] if i < 8 else expected[step + 1][1][0]
                assert torch.equal(ours[1][i], following)
    parallel = batches(source, whole, workers=2)
    assert_same(first(parallel, 8), got)
    assert parallel.damaged == made.damaged
    assert_same(first(batches(source, whole, start_step=5), 3), got[5:])


def test_a_data_set_that_cannot_be_read_at_all_ends_with_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, train=4, val=0)
    source = open_source(tmp_path, "train")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DamagedImage, match="12 images in a row"):
        first(batches(source, SMALL), 1)


def test_more_classes_than_the_recipe_has_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--num-classes 3"):
        batches(open_source(folder, "train"), SMALL.replace(num_classes=2))


UNFINISHED = """
import os, signal, sys
from bnlib.imagenet import recipe
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.folders import open_source
small = recipe("bn-x5").replace(image_size=32, num_classes=3, batch_size=8, shards=6)
made = batches(open_source(sys.argv[1], "train"), small, workers=1)
next(made)
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
os.killpg(0, signal.SIGTERM)
for _ in range(12):
    next(made)
print("went on", flush=True)
made.circle = made  # a circle, which only the end of the process opens
"""


def test_workers_survive_a_signal_to_the_group_and_end_with_the_process(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert done.stdout.split("\n")[:2] == ["told", "went on"]
    assert done.returncode == 0, done.stderr


TINY = Path(os.environ.get("BNLIB_DATA", "")) / "tiny-imagenet-100" / "val.tar"


@pytest.mark.skipif(not TINY.is_file(), reason="set BNLIB_DATA to a folder with tiny-imagenet-100")
def test_real_images_pass_through_the_whole_path(tmp_path: Path) -> None:
    with tarfile.open(TINY) as archive:
        members = [entry for entry in archive.getmembers() if entry.isfile()][:400]
        archive.extractall(tmp_path, members, filter="data")
    (tmp_path / "val").rename(tmp_path / "train")
    source = open_source(tmp_path, "train")
    assert len(source) == 400
    recipe_ = SMALL.replace(num_classes=100, batch_size=100, photometric=0.0)
    made = batches(source, recipe_)
    images = torch.cat([images for _, images, _ in first(made, 4)])
    assert not made.damaged
    assert images.mean().abs() < 0.5
    assert 0.7 < images.std() < 1.4
