"""A listing of image files, kept in a file and memory-mapped by everyone who opens it afterwards.

ImageNet's 1.28 million files take long to list and longer to look at one by one, more so on a
network disk and in every process. :class:`Listing` holds what that gives: about 60 MB.

The file is one record in NumPy's own ``.npy`` format.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnlib.runs import write_atomically

__all__ = ["Listing", "read_index", "write_index"]

_LOGGER = logging.getLogger(__name__)


class Listing(NamedTuple):
    """The files of a folder of images.

    Attributes
    ----------
    names
        uint8: the names one behind the other, without anything between them.
    ends
        int64 (n,): where in ``names`` each ends.
    labels
        int64 (n,).
    """

    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64]

    def name(self, index: int) -> str:
        """The name of a file."""
        first = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[first : self.ends[index]].tobytes())


def _digest(listing: Listing, about: bytes) -> bytes:
    digest = hashlib.sha256(about)
    for array in listing:
        digest.update(array.data)
    return digest.digest()


def write_index(path: Path, listing: Listing, valid_for: dict[str, Any], fingerprint: str) -> None:
    """Write a listing and the fingerprint of its images, for :func:`read_index`.

    Parameters
    ----------
    path
        The file; replaced at once, never partly.
    listing
        What was found.
    valid_for
        What must be unchanged for the listing to be still right.
    fingerprint
        As :meth:`bnlib.imagenet.data.source.Source.fingerprint` gives it.
    """
    about = json.dumps({**valid_for, "fingerprint": fingerprint}).encode()
    digest = _digest(listing, about)
    fields: dict[str, NDArray[Any]] = {
        "ends": listing.ends,
        "labels": listing.labels,
        "names": listing.names,
        "about": np.frombuffer(about, dtype=np.uint8),
        "sha256": np.frombuffer(digest, dtype=np.uint8),
    }
    record = np.empty(1, [(name, array.dtype, array.shape) for name, array in fields.items()])
    for name, array in fields.items():
        record[0][name][:] = array
    content = io.BytesIO()
    np.save(content, record)
    try:
        write_atomically(path, content.getbuffer())
    except OSError as error:
        _LOGGER.warning("the index %s cannot be written: %s; files are listed again", path, error)


def read_index(path: Path, valid_for: dict[str, Any]) -> tuple[Listing, str] | None:
    """The listing in a file and the fingerprint, or None if it has to be made anew.

    Parameters
    ----------
    path
        What :func:`write_index` wrote, perhaps.
    valid_for
        The present state of what must be unchanged.
    """
    if not path.exists():
        return None
    try:
        record = np.load(path, mmap_mode="r")[0]
        # plain arrays: slices of np.memmap are slow
        listing = Listing(*(np.asarray(record[field]) for field in Listing._fields))
        about = record["about"].tobytes()
        if record["sha256"].tobytes() != _digest(listing, about):
            raise ValueError("its content has changed since it was written")
        found = json.loads(about)
        fingerprint = str(found.pop("fingerprint"))
    except Exception as error:  # NumPy raises nearly everything on damaged files
        _LOGGER.warning("the index %s is damaged (%s) and is made anew", path, error)
        return None
    if found != valid_for:
        _LOGGER.info("the index %s is of another state of the data and is made anew", path)
        return None
    return listing, fingerprint
