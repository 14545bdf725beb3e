"""What a source of images is: a sequence of encoded images with their labels."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Example", "Source", "SourceError", "check_classes"]


class SourceError(RuntimeError):
    """Images cannot be had from a location; the message says what was looked for."""


class Example(NamedTuple):
    """One image.

    Attributes
    ----------
    data
        The encoded image: the content of its file.
    label
        Index of its class in ``classes``.
    name
        What to call it in a message.
    """

    data: bytes
    label: int
    name: str


class Source(ABC):
    """A sequence of encoded images with labels.

    Attributes
    ----------
    classes
        The classes' names; a label is an index into them.
    labels
        int64 (n,): the labels of all examples.
    location
        Where the images lie, for messages.
    """

    classes: list[str]
    labels: NDArray[np.int64]
    location: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The example of that index, from 0; ``OSError`` if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an example, without reading it."""

    @abstractmethod
    def _sizes(self) -> Iterable[int]:
        """The encoded sizes of all examples, in bytes."""

    def fingerprint(self) -> str:
        """sha256 over the names, sizes and labels of all examples, as hexadecimal digits.

        Two sources with the same fingerprint hold, as far as one sees without reading them, the
        same images in the same order.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for index, size in enumerate(self._sizes()):
            line = f"{self.name(index)}\t{size}\t{self.labels[index]}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def check_classes(source: Source, trained: Sequence[str], where: str) -> None:
    """Refuse images whose labels do not mean the classes that a network is trained on.

    The same names must have the same numbers; classes at the end may be missing. As many classes
    with other names altogether pass: the same data set goes by WordNet's ids and by words.

    Parameters
    ----------
    source
        The images.
    trained
        The classes of the training set.
    where
        What was trained, or on what; for the message.

    Raises
    ------
    SourceError
        If the labels mean other classes; the message names the first that differs.
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
