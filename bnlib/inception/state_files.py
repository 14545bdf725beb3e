"""State dicts from files that others wrote: only tensors are read, and a fault is explained."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXPECTED", "first_few", "open_state_dict"]

EXPECTED = (
    "a state dict of the pretrainedmodels port of BN-Inception, as in bn_inception-52deb4733.pth"
)
FILE_STARTS = {
    b"<": "a web page, so the download has failed",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PK": "a zip archive as torch.save writes, but cut off or damaged, or holding something else",
    b"\x80": "a pickle, but cut off or damaged, or no checkpoint",
}


def open_state_dict(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file or of a state dict by name, and what to call it in messages.

    The tensors may be nested under "state_dict", and all names may begin with "module.".
    """
    if isinstance(source, (str, os.PathLike)):
        name = f"file {os.fspath(source)!r}"
        content = _read(source, name)
    elif isinstance(source, Mapping):
        name, content = "the state dict", source
    else:
        raise TypeError(
            f"got a {type(source).__name__}; expected a path or a state dict (of a model: "
            "model.state_dict())"
        )
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}; expected {EXPECTED}")
    if others := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{name} holds {first_few(map(repr, others))} that are not tensors; expected "
            f'{EXPECTED}, at the top or under "state_dict"'
        )
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    return {str(key)[len(prefix) :]: value.detach() for key, value in content.items()}, name


def _read(path: str | os.PathLike[str], name: str) -> Any:
    """The content of a file, if it is only tensors and plain containers."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {name}; expected {EXPECTED}, downloaded before")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a directory; expected a file with {EXPECTED}")
    with open(path, "rb") as file:
        start = file.read(8)
        file.seek(0)
        if not start:
            raise ValueError(f"{name} is empty; expected {EXPECTED}. Download it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for a damaged file
            reason = str(error)
    # Neither chained nor shown: torch's own messages advise to load the file without this check.
    if code := re.search(r"(?:GLOBAL|global:?) (\S+\.\S+)", reason):
        raise ValueError(
            f"{name} holds more than tensors ({code[1]}), and loading that could run code, so it "
            f"was not loaded; expected {EXPECTED}. If it is yours, save model.state_dict() instead"
        )
    kinds = (kind for head, kind in FILE_STARTS.items() if start.lstrip().startswith(head))
    looks = next(kinds, f"not a file that torch.save writes: its first bytes are {start!r}")
    raise ValueError(
        f"{name} cannot be read as a checkpoint. It is {looks}. Expected {EXPECTED}. Compare its "
        "size with the source's, or download it again"
    )


def first_few(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
