"""Checkpoints that survive: atomic, checksummed, the last few kept.

A checkpoint is a file ``step-<step>-<checksum>.pt`` that ``torch.load(weights_only=True)`` reads.
The checksum in its name, the first 16 digits of the content's sha256, tells a whole file from a
damaged one.  It is written under a temporary name, flushed to disk and renamed, so that a kill or a
full disk leaves the files before it as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bnlib.runs import write_atomically

__all__ = ["CheckpointError", "checkpoints", "load", "load_latest", "lock_run_folder", "save"]

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Keep a folder from being trained in twice: each run would remove the other's checkpoints.

    A lock on a file there does, which ends with this process in whatever way.  If another process
    has it, that is a :class:`CheckpointError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(
                f"another process trains in {folder}; wait for it, or choose another --out. If "
                f"there is none, on no machine, remove {folder / '.lock'}"
            ) from error
        except (ImportError, OSError):
            pass  # some systems and network disks have no locks
        yield


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def save(folder: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, and remove all in the folder but it and the ``keep - 1`` before it.

    ``state`` holds tensors, numbers and strings in dictionaries and lists.  If it cannot be
    written, as when the disk is full, that is an ``OSError``, and what stood there stands still.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"step-{state['step']:09d}-{digest}.pt"
    for left in folder.glob(".*.pt.*.tmp"):  # by a kill; they could fill the disk
        left.unlink(missing_ok=True)
    write_atomically(path, content)
    found = checkpoints(folder)
    kept = [path, *(other for other in found if other.name[:14] < path.name[:14])][:keep]
    for other in found:  # one of a later step was passed over as damaged, or this would not come
        if other not in kept:
            other.unlink(missing_ok=True)
    return path


def load(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint or of ``network.pt``, tensors on the CPU.

    The folder of a run stands for its newest readable checkpoint.  What does not exist, is damaged
    or holds something else is a :class:`CheckpointError`.  Nothing in a file is executed.
    """
    path = Path(path)
    if path.is_dir():
        if (latest := load_latest(path)) is None:
            raise CheckpointError(f"{path} has no checkpoint (step-*.pt); train there first")
        return latest
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    name = _NAME.fullmatch(path.name)
    if name and hashlib.sha256(content).hexdigest()[:16] != name[2]:
        raise CheckpointError(
            f"{path} is damaged: its content does not have the checksum in its name. Use the "
            "checkpoint before it"
        )
    try:
        if not name and (bad := zipfile.ZipFile(io.BytesIO(content)).testzip()):
            raise ValueError(f"its part {bad} is damaged")  # which torch would not notice
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no checkpoint of a training run: {first}") from error
    if not isinstance(state, dict) or not {"recipe", "step", "model"} <= state.keys():
        raise CheckpointError(
            f"{path} holds no training run of this library: it lacks 'recipe', 'step' or 'model'"
        )
    return state


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read, or None if it has none.

    A damaged one is passed over with a warning; that all are is a :class:`CheckpointError`.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            return load(path)
        except CheckpointError as error:
            _LOGGER.warning("%s; falling back to the one before", error)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; remove them to start "
            "anew"
        )
    return None
