"""The index of a folder: written once, read by everyone after, never believed when it is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from image_sets import GOOD, SMALL
from images import write_folder

from bnlib.imagenet.data import folders
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_folder(tmp_path / "images", train=3, val=2)
    (root / "train" / "ant" / os.fsdecode(b"\xff odd.png")).write_bytes(GOOD)
    (root / "train" / "cat" / ("long" * 60 + ".png")).write_bytes(GOOD)
    return root


def names(source: folders.Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def no_look_at_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("_images", "_size"):
        monkeypatch.setattr(folders, function, lambda _: pytest.fail("looked at the files"))


def test_the_fingerprint_is_the_one_of_recorded_runs(root: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b'["ant", "bee", "cat"]')
    for label, name in enumerate((b"ant", b"bee", b"cat")):
        folder = os.fsencode(root / "train") + b"/" + name
        for file in sorted(os.fsdecode(entry) for entry in os.listdir(folder)):
            size = os.stat(folder + b"/" + os.fsencode(file)).st_size
            digest.update(name + b"/" + os.fsencode(file) + f"\t{size}\t{label}\n".encode())
    for index in (None, tmp_path / "index", tmp_path / "index"):
        assert open_source(root, "train", index).fingerprint() == digest.hexdigest()


def test_an_indexed_folder_is_opened_without_a_look_at_its_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = (
        open_source(root, "train"),
        open_source(root, "train", tmp_path / "run" / "index"),
    )
    plain.fingerprint()
    no_look_at_files(monkeypatch)
    again = open_source(root, "train", tmp_path / "run" / "index")
    for source in (first, again, pickle.loads(pickle.dumps(again))):
        assert names(source) == names(plain)
        assert source.labels.tolist() == plain.labels.tolist()
        assert source.classes == plain.classes
        assert source.fingerprint() == plain.fingerprint()
        assert source[4] == plain[4]


def test_the_batches_of_an_indexed_folder_are_the_same(root: Path, tmp_path: Path) -> None:
    plain = next(batches(open_source(root, "train"), SMALL))
    for workers in (0, 1):
        source = open_source(root, "train", tmp_path / "index")
        ours = next(batches(source, SMALL, workers=workers))
        assert all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("change", ["a file", "a class", "the training set", "the folder"])
def test_an_index_of_other_data_is_made_anew(root: Path, tmp_path: Path, change: str) -> None:
    index = tmp_path / "index"
    before = open_source(root, "val", index)
    if change == "a file":
        (root / "val" / "bee" / "new.png").write_bytes(GOOD)
    elif change == "a class":
        (root / "val" / "bee").rename(root / "val" / "dog")
        (root / "train" / "bee").rename(root / "train" / "dog")
    elif change == "the training set":
        (root / "train" / "aardvark").mkdir()
    else:
        root = root.rename(tmp_path / "elsewhere")
    after = open_source(root, "val", index)
    plain = open_source(root, "val")
    assert names(after) == names(plain)
    assert after.labels.tolist() == plain.labels.tolist()
    assert after.fingerprint() == plain.fingerprint()
    assert (after.fingerprint() == before.fingerprint()) == (change == "the folder")


@pytest.mark.parametrize("damage", ["cut short", "a changed bit", "another file", "empty"])
def test_a_damaged_index_is_made_anew_and_that_is_said(
    root: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "index"
    expected = names(open_source(root, "train", index))
    content = bytearray(index.read_bytes())
    if damage == "cut short":
        del content[-40:]
    elif damage == "a changed bit":
        content[content.index(b"000.JPEG")] ^= 1
    else:
        content[:] = json.dumps({"some": "thing"}).encode() if damage == "another file" else b""
    index.write_bytes(content)
    assert names(open_source(root, "train", index)) == expected
    assert caplog.text.count("is damaged") == 1
    assert names(open_source(root, "train", index)) == expected
    assert caplog.text.count("is damaged") == 1, "it has been written again"


def test_an_index_that_cannot_be_written_is_reported_and_not_needed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    source = open_source(root, "train", tmp_path / "file" / "index")
    assert names(source) == names(open_source(root, "train"))
    assert "cannot be written" in caplog.text


def test_classes_without_images_are_named_at_every_opening(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for file in (root / "val" / "bee").iterdir():
        file.unlink()
    for _ in range(2):
        caplog.clear()
        open_source(root, "val", tmp_path / "index")
        assert "no images of 1 of its 3 classes: bee" in caplog.text
