"""What a source of images is: a sequence of encoded images with their labels."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Example", "Source", "SourceError"]


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
