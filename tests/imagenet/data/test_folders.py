"""Folders of images and ImageNet's own archives."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import GOOD
from images import write_folder

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SourceError


def test_a_folder_gives_bytes_labels_and_names_in_a_fixed_order(folder: Path) -> None:
    source = open_source(folder, "train")
    assert len(source) == 36
    assert source.classes == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    example = source[13]
    assert example.name == "bee/001.JPEG"
    assert example.label == 1
    assert example.data == (folder / "train" / "bee" / "001.JPEG").read_bytes()


def test_files_that_are_no_images_are_passed_over_and_odd_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "train" / "é b").mkdir(parents=True)
    for name in ("ü 1.JPG", "2.png", ".DS_Store", "._2.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "train" / "é b" / name).write_bytes(GOOD)
    source = open_source(tmp_path, "train")
    assert [source[i].name for i in range(len(source))] == ["é b/2.png", "é b/ü 1.JPG"]


def test_a_label_means_the_same_class_in_both_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=2)
    shutil.rmtree(tmp_path / "val" / "ant")
    assert open_source(tmp_path, "val").labels.tolist() == [1, 1, 2, 2]
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(SourceError, match="does not have: dog"):
        open_source(tmp_path, "val")


def test_the_fingerprint_changes_with_a_name_a_size_and_a_label(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=0)
    seen = {open_source(tmp_path, "train").fingerprint()}
    assert open_source(tmp_path, "train").fingerprint() in seen
    first = tmp_path / "train" / "ant" / "000.JPEG"
    first.write_bytes(first.read_bytes() + b"!")
    seen.add(open_source(tmp_path, "train").fingerprint())
    first.rename(first.with_name("0000.JPEG"))
    seen.add(open_source(tmp_path, "train").fingerprint())
    (tmp_path / "train" / "bee").rename(tmp_path / "train" / "dog")
    seen.add(open_source(tmp_path, "train").fingerprint())
    assert len(seen) == 4


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere", "train")
    with pytest.raises(SourceError, match=r"looked for train/<class>/\*.*found nothing"):
        open_source(tmp_path, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="not a folder"):
        open_source(tmp_path / "file", "train")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(SourceError, match="no images in"):
        open_source(tmp_path, "train")
    with pytest.raises(ValueError, match="split"):
        open_source(tmp_path, "test")


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of ImageNet's, in its own form, with their own checksums."""
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    wnids = ["n01440764", "n01443537"]
    for wnid in wnids:
        tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": GOOD for i in range(3)})
    inner = {f"{wnid}.tar": (tmp_path / f"{wnid}.tar").read_bytes() for wnid in wnids}
    tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    tar(
        tmp_path / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{i:08}.JPEG": GOOD for i in range(1, 5)},
    )
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("n", "i4")]
    synsets = np.array([(i + 1, w, "fish", "", 0) for i, w in enumerate(wnids)], dtype=kinds)
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    data = "ILSVRC2012_devkit_t12/data"
    truth = f"{data}/ILSVRC2012_validation_ground_truth.txt"
    tar(
        tmp_path / "ILSVRC2012_devkit_t12.tar.gz",
        {f"{data}/meta.mat": matrix.getvalue(), truth: b"2\n1\n2\n2\n"},
    )
    sums = {
        kind: (name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest())
        for kind, (name, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    return tmp_path


def test_imagenets_own_archives_are_unpacked_once(archives: Path) -> None:
    train, val = open_source(archives, "train"), open_source(archives, "val")
    assert train.classes == val.classes == ["n01440764", "n01443537"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 1, 1, 1]
    assert val[0].name.endswith("ILSVRC2012_val_00000002.JPEG")
    (archives / "ILSVRC2012_img_train.tar").unlink()
    assert open_source(archives, "train").fingerprint() == train.fingerprint()


def test_an_interrupted_unpacking_does_not_pass_for_a_data_set(archives: Path) -> None:
    (archives / ".unpacking-train" / "n01440764").mkdir(parents=True)
    assert len(open_source(archives, "train")) == 6
    (archives / "ILSVRC2012_img_val.tar").write_bytes(b"damaged")
    with pytest.raises(SourceError, match=r"img_val\.tar cannot be unpacked"):
        open_source(archives, "val")
    assert not (archives / "val").exists()
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(SourceError, match="development kit"):
        open_source(archives, "val")
