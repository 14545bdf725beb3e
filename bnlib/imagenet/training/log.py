"""What a training run reports: JSON lines, TensorBoard's files, and a bar."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnlib.runs import write_atomically

__all__ = ["Metrics", "read_metrics"]

_LOGGER = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one cut short by a kill, at the end, is left out.

    Raises
    ------
    ValueError
        If another line is damaged.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], **row})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is damaged: {line[:40]!r}; remove it to go on"
                ) from error
    return rows


class Metrics:
    """``metrics.jsonl`` in the run's folder: one JSON object a line, each with its ``step``.

    Parameters
    ----------
    folder
        The run's folder.
    step
        Steps done so far; lines beyond, from before a resumption, are removed.
    tensorboard
        Whether to write TensorBoard's files in ``folder/tensorboard`` too.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._unwritten: list[str] = []
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                _LOGGER.info("tensorboard is not installed; metrics go to %s only", self._path)
            else:
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Add a line.  One that finds the disk full is tried again with the next."""
        self._unwritten.append(json.dumps({"step": step, **values}) + "\n")
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            _LOGGER.error("%s cannot be written: %s", self._path, error)
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)  # no half line stays in the middle
        else:
            self._unwritten.clear()
        with self._board_may_fail():
            for name, value in _numbers(values):
                if self._board:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's files."""
        with self._board_may_fail():
            if self._board:
                self._board.close()

    @contextlib.contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """Its writer is of no use after a failure; everything is in ``metrics.jsonl`` too."""
        try:
            yield
        except OSError as error:
            _LOGGER.error("TensorBoard's files cannot be written: %s; going on without", error)
            self._board = None


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, (int, float)):
            yield name, value
