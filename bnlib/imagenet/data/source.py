"""What a source of images is: a sequence of encoded images with their labels."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SPLITS", "Example", "Source", "SourceError", "check_classes"]

# The part for training and the part that the paper evaluates on, and what data sets call them.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


class SourceError(RuntimeError):
    """Raised if a location has no readable images; the message says what was looked for."""


class Example(NamedTuple):
    """One image: the content of its file, the index of its class, and what messages call it."""

    data: bytes
    label: int
    name: str


class Source(ABC):
    """A sequence of encoded images with labels."""

    classes: list[str]  # a label is an index into them
    labels: NDArray[np.int64]  # of all examples
    location: str  # for messages
    _fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The example of that index, from 0; ``OSError`` if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an example, without reading it."""

    @abstractmethod
    def _names_and_sizes(self) -> Iterable[tuple[str, int]]:
        """The names and encoded sizes (bytes) of all examples."""

    def fingerprint(self) -> str:
        """sha256 over the names, sizes and labels of all examples, as hexadecimal digits.

        Two sources with the same fingerprint hold the same images in the same order, as far as can
        be seen without reading them. Computed at the first call, which looks at every image's size.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.classes).encode())
            rows = zip(self._names_and_sizes(), self.labels.tolist(), strict=True)
            for (name, size), label in rows:
                line = f"{name}\t{size}\t{label}\n"
                digest.update(line.encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def check_classes(source: Source, trained: Sequence[str], where: str) -> None:
    """Raise ``SourceError`` if labels do not mean the classes that a network is trained on.

    The same names must have the same numbers; classes at the end may be missing. As many classes
    with entirely different names pass: the same data set may name them by WordNet's ids or by
    words. ``where`` says what was trained, or on what, for the message.
    """
    found = source.classes
    if len(found) == len(trained) and not set(found) & set(trained):
        return
    for label, name in enumerate(found):
        there = repr(trained[label]) if label < len(trained) else "no class"
        if there != repr(name):
            raise SourceError(
                f"class {label} of {len(found)} is {name!r} in {source.location}, {there} of "
                f"{len(trained)} in {where}. The same classes are needed: give a folder that has "
                "train/ beside val/, or the data set that was trained on"
            )
