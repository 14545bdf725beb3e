"""A listing of image files, kept in a file and memory-mapped by everyone who opens it afterwards.

ImageNet's 1.28 million files take long to list and longer to look at one by one, more so on a
network disk and in every process. :class:`Listing` holds what that gives: about 60 MB.

The file is one record in NumPy's own ``.npy`` format, and the sha256 of that.
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
    """The files of a folder of images."""

    names: NDArray[np.uint8]  # one behind the other, without anything between them
    ends: NDArray[np.int64]  # where in ``names`` each ends
    labels: NDArray[np.int64]

    def name(self, index: int) -> str:
        """The name of a file."""
        first = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[first : self.ends[index]].tobytes())


def write_index(path: Path, listing: Listing, valid_for: dict[str, Any], fingerprint: str) -> None:
    """Write a listing and the fingerprint of its images, for :func:`read_index`.

    ``valid_for`` says what must be unchanged for the listing to be still right.
    """
    about = json.dumps({**valid_for, "fingerprint": fingerprint}).encode()
    fields: dict[str, NDArray[Any]] = {
        "ends": listing.ends,
        "labels": listing.labels,
        "names": listing.names,
        "about": np.frombuffer(about, dtype=np.uint8),
    }
    record = np.empty(1, [(name, array.dtype, array.shape) for name, array in fields.items()])
    for name, array in fields.items():
        record[0][name][:] = array
    content = io.BytesIO()
    np.save(content, record)
    content.write(hashlib.sha256(content.getbuffer()).digest())
    try:
        write_atomically(path, content.getbuffer())
    except OSError as error:
        _LOGGER.warning("the index %s cannot be written: %s; files are listed again", path, error)


def read_index(path: Path, valid_for: dict[str, Any]) -> tuple[Listing, str] | None:
    """The listing in a file and the fingerprint, or None if it has to be made anew."""
    if not path.exists():
        return None
    try:
        content = np.memmap(path, mode="r")
        if content[-32:].tobytes() != hashlib.sha256(content[:-32].data).digest():
            raise ValueError("its content has changed since it was written")
        record = np.load(path, mmap_mode="r")[0]
        # plain arrays: slices of np.memmap are slow
        listing = Listing(*(np.asarray(record[field]) for field in Listing._fields))
        found = json.loads(record["about"].tobytes())
        fingerprint = str(found.pop("fingerprint"))
    except Exception as error:  # NumPy raises nearly everything on damaged files
        _LOGGER.warning("the index %s is damaged (%s) and is made anew", path, error)
        return None
    if found != valid_for:
        _LOGGER.info("the index %s is of another state of the data and is made anew", path)
        return None
    return listing, fingerprint
