"""Where the images come from: one interface to folders, archives, data sets and packed copies."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bnlib.imagenet.data import hub
from bnlib.imagenet.data.index import Listing, read_index, write_index
from bnlib.imagenet.data.source import SPLITS, Example, Source, SourceError

__all__ = ["FolderSource", "open_source"]

_LOGGER = logging.getLogger(__name__)
SUFFIXES = tuple(".jpeg .jpg .png .ppm .bmp .pgm .tif .tiff .webp .gif .avif".split())
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class FolderSource(Source):
    """Images in ``<folder>/<class>/*``, sorted by class and name.

    ``classes`` are in the order of their labels: by default all subfolders, sorted; for the
    validation set those of the training set, so that a label means the same class.

    ``index`` is a file that keeps the listing and the fingerprint. As long as the class folders
    have the names and times of last change that it records, no file is listed or looked at;
    otherwise, and if there is none, it is written. Files whose content is replaced without changing
    their folder go unnoticed: delete the index then.
    """

    def __init__(
        self, folder: Path, classes: list[str] | None = None, index: Path | None = None
    ) -> None:
        self.folder, self.location = folder, str(folder)
        found = _subfolders(folder)
        if classes is not None and (strange := [name for name in found if name not in classes]):
            raise SourceError(
                f"{folder} has folders that the training set does not have: "
                f"{', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}; the classes of "
                "both must be the same"
            )
        self.classes = found if classes is None else list(classes)
        if index is None:
            self._listing = self._list(found)
        else:
            valid_for = {
                "folder": str(folder.resolve()),
                "classes": self.classes,
                "changed_ns": {name: (folder / name).stat().st_mtime_ns for name in found},
            }
            if (known := read_index(index, valid_for)) is None:
                self._listing = self._list(found)
                write_index(index, self._listing, valid_for, self.fingerprint())
                known = read_index(index, valid_for)  # memory-mapped: shared by all processes
            if known is not None:
                self._listing, self._fingerprint = known
            self.labels = self._listing.labels
        present = np.bincount(self.labels, minlength=len(self.classes))
        if lacking := [name for name, n in zip(self.classes, present, strict=True) if not n]:
            _LOGGER.warning(
                "%s has no images of %d of its %d classes: %s%s",
                folder,
                len(lacking),
                len(self.classes),
                ", ".join(sorted(lacking)[:5]),
                " ..." if len(lacking) > 5 else "",
            )

    def _list(self, found: list[str]) -> Listing:
        number = {name: label for label, name in enumerate(self.classes)}
        names, lengths, labels = bytearray(), list[int](), list[int]()
        for name in found:
            files = [os.fsencode(f"{name}/{file}") for file in _images(self.folder / name)]
            names += b"".join(files)
            lengths += map(len, files)
            labels += [number[name]] * len(files)
        if not names:
            raise SourceError(
                f"no images in {self.folder}: looked for {self.folder}/<class>/* with the endings "
                f"{', '.join(SUFFIXES)}; {len(found)} subfolders found"
            )
        self.labels = np.array(labels, dtype=np.int64)
        return Listing(np.frombuffer(names, dtype=np.uint8), np.cumsum(lengths), self.labels)

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self._listing.name(index)

    def __getitem__(self, index: int) -> Example:
        name = self.name(index)
        with open(f"{self.location}/{name}", "rb", buffering=0) as file:
            data = file.read()
        return Example(data, int(self.labels[index]), name)

    def _names_and_sizes(self) -> Iterable[tuple[str, int]]:
        for index in range(len(self)):
            name = self.name(index)
            yield name, _size(f"{self.location}/{name}")


def open_source(location: str | Path, split: str, index: Path | None = None) -> Source:
    """The images of a location.

    Parameters
    ----------
    location
        One of

        * a folder with ``train/<class>/*`` and ``val/<class>/*``;
        * a folder with ImageNet's own archives, which are unpacked into such folders first, by
          torchvision, once;
        * a folder with a Hugging Face data set: as ``python -m bnlib pack`` or ``save_to_disk``
          writes it, or Parquet or Arrow files named after their split;
        * ``hf:NAME``, a data set of the Hugging Face hub, such as ``hf:ILSVRC/imagenet-1k``.
    split
        "train" or "val".
    index
        A file that spares listing a folder of images again: see :class:`FolderSource`. Data sets in
        the Hugging Face format need none.

    Raises
    ------
    ValueError
        If the split is unknown.
    SourceError
        If there are no such images; the message says what was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {tuple(SPLITS)}; got {split!r}")
    if str(location).startswith("hf:"):
        return hub.from_hub(str(location)[3:], split)
    root = Path(location).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise SourceError(f"{root} {what}; give a folder of images or hf:NAME")
    try:
        if (root / split / "index.npz").exists():
            raise SourceError(
                f"{root / split} was packed in a format that is no longer read; delete it and pack "
                "the original images again with python -m bnlib pack"
            )
        if (root / split).is_dir() and _subfolders(root / split):
            trained = root / "train"
            classes = _subfolders(trained) if split == "val" and trained.is_dir() else None
            return FolderSource(root / split, classes or None, index)
        if (root / ARCHIVES[split]).exists():
            _unpack(root, split)
            return open_source(root, split, index)
        if (dataset := hub.from_folder(root, split)) is not None:
            return dataset
    except PermissionError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    there = sorted(entry.name for entry in root.iterdir())
    raise SourceError(
        f"no {split} images in {root}: looked for {split}/<class>/*, {ARCHIVES[split]}, "
        f"dataset_dict.json, {split}/dataset_info.json, {split}*.parquet and {split}*.arrow; found "
        f"{', '.join(there[:8]) or 'nothing'}{' ...' if len(there) > 8 else ''}"
    )


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere; an image that cannot be read is skipped later
        return -1


def _images(folder: Path) -> list[str]:
    """Names of the files with an image's ending; macOS's shadow files (._*) are none."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return sorted(n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith("."))


def _unpack(root: Path, split: str) -> None:
    """Unpack ImageNet's archive into ``root/split``, under another name until it is complete."""
    from torchvision.datasets import imagenet

    if split == "val" and not (root / DEVKIT).exists():
        raise SourceError(
            f"{root / ARCHIVES[split]} is there but {DEVKIT} is not; ImageNet's development kit "
            "says which class each image has; put it beside the archive"
        )
    _LOGGER.warning("unpacking %s, once; this takes a while", root / ARCHIVES[split])
    part = f".unpacking-{split}"
    try:
        shutil.rmtree(root / part, ignore_errors=True)
        if split == "train":
            imagenet.parse_train_archive(str(root), folder=part)
        else:
            imagenet.parse_devkit_archive(str(root))
            imagenet.parse_val_archive(str(root), folder=part)
        if (root / split).exists():  # empty, or it would not have been unpacked
            (root / split).rmdir()
        os.replace(root / part, root / split)
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"{root / ARCHIVES[split]} cannot be unpacked into {root}: {error}"
        ) from error
