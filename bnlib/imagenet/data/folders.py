"""Where the photographs come from: one interface to folders, archives, data sets and packed copies.

A source is a sequence of encoded images with their labels. Opening one costs a listing, not a look
into the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bnlib.imagenet.data import hub
from bnlib.imagenet.data.source import Example, Source, SourceError

__all__ = ["FolderSource", "PackedSource", "open_source"]

_LOGGER = logging.getLogger(__name__)
SPLITS = ("train", "val")
SUFFIXES = tuple(".jpeg .jpg .png .ppm .bmp .pgm .tif .tiff .webp .gif .avif".split())
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class FolderSource(Source):
    """Images in ``<folder>/<class>/*``, sorted by class and name.

    Parameters
    ----------
    folder
        The folder of the split.
    classes
        The classes in the order of their labels; all subfolders, sorted, by default. Given for the
        validation set, so that a label means the same class as in training.

    Raises
    ------
    SourceError
        If the folder cannot be read, has no images, or has subfolders that are no classes.
    """

    def __init__(self, folder: Path, classes: list[str] | None = None) -> None:
        self.folder, self.location = folder, str(folder)
        found = _subfolders(folder)
        if classes is not None and (strange := [name for name in found if name not in classes]):
            raise SourceError(
                f"{folder} has folders that the training set does not have: "
                f"{', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}; the classes of "
                "both must be the same"
            )
        self.classes = found if classes is None else list(classes)
        number = {name: label for label, name in enumerate(self.classes)}
        names: list[bytes] = []
        labels: list[int] = []
        for name in found:
            files = _images(folder / name)
            names += [os.fsencode(f"{name}/{file}") for file in files]
            labels += [number[name]] * len(files)
        if not names:
            raise SourceError(
                f"no images in {folder}: looked for {folder}/<class>/* with the endings "
                f"{', '.join(SUFFIXES)}; {len(found)} subfolders found"
            )
        if lacking := sorted(set(self.classes) - {self.classes[label] for label in labels}):
            _LOGGER.warning(
                "%s has no images of %d of its %d classes: %s%s",
                folder,
                len(lacking),
                len(self.classes),
                ", ".join(lacking[:5]),
                " ..." if len(lacking) > 5 else "",
            )
        # One array, not a list: processes that share it do not copy it by counting references.
        self._names = np.array(names)
        self.labels = np.array(labels, dtype=np.int64)

    def name(self, index: int) -> str:
        """The path below the folder."""
        return os.fsdecode(bytes(self._names[index]))

    def __getitem__(self, index: int) -> Example:
        name = self.name(index)
        with open(f"{self.location}/{name}", "rb", buffering=0) as file:
            data = file.read()
        return Example(data, int(self.labels[index]), name)

    def _sizes(self) -> Iterable[int]:
        return (_size(f"{self.location}/{self.name(i)}") for i in range(len(self)))


class PackedSource(Source):
    """A split that :mod:`bnlib.imagenet.data.pack` has written: many images in few files.

    Parameters
    ----------
    folder
        Of the split, with ``index.npz`` and the record files.

    Raises
    ------
    SourceError
        If the index is damaged or of another version, or a record file is missing or too short.
    """

    VERSION = 1

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        try:
            with np.load(folder / "index.npz", allow_pickle=False) as index:
                about = json.loads(bytes(index["about"]))
                self._names, self.labels = index["names"], index["labels"]
                self._files, self._offsets = index["files"], index["offsets"]
                self._lengths = index["lengths"]
        except Exception as error:  # numpy and zipfile raise nearly everything on damaged files
            raise SourceError(
                f"{folder / 'index.npz'} is damaged ({error}); pack the data set again"
            ) from error
        if about["version"] != self.VERSION:
            raise SourceError(
                f"{folder} was packed in version {about['version']} of the format; this bnlib "
                f"reads version {self.VERSION}; pack the data set again"
            )
        self.classes: list[str] = about["classes"]
        self.records: dict[str, str] = about["sha256"]
        self._paths = [folder / name for name in self.records]
        ends = np.zeros(len(self._paths), dtype=np.int64)
        np.maximum.at(ends, self._files, self._offsets + self._lengths)
        for path, end in zip(self._paths, ends, strict=True):
            if not path.exists() or path.stat().st_size != end:
                raise SourceError(
                    f"{path} is missing or does not have its {end} bytes; pack the data set again"
                )
        self._open: dict[int, int] = {}

    def name(self, index: int) -> str:
        """The name in the source that was packed."""
        return os.fsdecode(bytes(self._names[index]))

    def __getitem__(self, index: int) -> Example:
        number = int(self._files[index])
        if number not in self._open:
            self._open[number] = os.open(self._paths[number], os.O_RDONLY)
        length = int(self._lengths[index])
        data = os.pread(self._open[number], length, int(self._offsets[index]))
        if len(data) != length:
            raise OSError(f"{self._paths[number]} ends early")
        return Example(data, int(self.labels[index]), self.name(index))

    def _sizes(self) -> Iterable[int]:
        return (int(length) for length in self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself.
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def verify(self) -> None:
        """Read everything and compare it with the checksums of the index.

        Raises
        ------
        SourceError
            If a record file is not what was written.
        """
        for path, expected in zip(self._paths, self.records.values(), strict=True):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise SourceError(
                    f"{path} is not what was packed: its sha256 is {found}, the index says "
                    f"{expected}; delete it with {path.parent / 'index.npz'} and pack again"
                )


def open_source(location: str | Path, split: str) -> Source:
    """The images of a location.

    Parameters
    ----------
    location
        One of

        * a folder with ``train/<class>/*`` and ``val/<class>/*``;
        * a folder with ImageNet's own archives, which are unpacked into such folders first, by
          torchvision, once;
        * a folder that ``python -m bnlib pack`` has written;
        * a folder with a Hugging Face data set: as ``save_to_disk`` writes it, or Parquet or Arrow
          files named after their split;
        * ``hf:NAME``, a data set of the Hugging Face hub, such as ``hf:ILSVRC/imagenet-1k``.
    split
        "train" or "val".

    Raises
    ------
    ValueError
        If the split is unknown.
    SourceError
        If there are no such images; the message says what was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
    if str(location).startswith("hf:"):
        return hub.from_hub(str(location)[3:], split)
    root = Path(location).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise SourceError(f"{root} {what}; give a folder of images or hf:NAME")
    try:
        if (root / split / "index.npz").exists():
            return PackedSource(root / split)
        if (root / split).is_dir() and _subfolders(root / split):
            return FolderSource(root / split, _trained(root) if split == "val" else None)
        if (root / ARCHIVES[split]).exists():
            _unpack(root, split)
            return open_source(root, split)
        if (dataset := hub.from_folder(root, split)) is not None:
            return dataset
    except PermissionError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    there = sorted(entry.name for entry in root.iterdir())
    raise SourceError(
        f"no {split} images in {root}: looked for {split}/<class>/*, {split}/index.npz (packed), "
        f"{ARCHIVES[split]}, dataset_dict.json, {split}*.parquet and {split}*.arrow; found "
        f"{', '.join(there[:8]) or 'nothing'}{' ...' if len(there) > 8 else ''}"
    )


def _trained(root: Path) -> list[str] | None:
    """The classes of the training set beside a validation set, if there is one."""
    train = root / "train"
    if (train / "index.npz").exists():
        return PackedSource(train).classes
    return (_subfolders(train) if train.is_dir() else None) or None


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
