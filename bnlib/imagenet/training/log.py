"""What a training run reports: lines of metrics, TensorBoard's files, a bar, the recorded run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnlib import runs
from bnlib.imagenet.evaluation.accuracy import Accuracy
from bnlib.imagenet.options import Options
from bnlib.imagenet.training.state import State
from bnlib.runs import Verdict, write_atomically

__all__ = ["Metrics", "Report", "errors_logged", "read_metrics"]

_LOGGER = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one cut short by a kill is left out.

    Another line that is damaged is a ``ValueError``.
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

    Lines beyond ``step``, from before a resumption, are removed.  What it holds goes to
    TensorBoard's files in ``tensorboard/`` too, if that is asked for.
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
        if self._board:
            try:
                for name, value in _numbers(values):
                    self._board.add_scalar(name, value, step)
            except OSError as error:  # the writer is of no use any more
                _LOGGER.error("TensorBoard's files cannot be written: %s; going on without", error)
                self._board = None

    def close(self) -> None:
        """Flush TensorBoard's files."""
        with errors_logged("the last of TensorBoard's files"):
            if self._board:
                self._board.close()


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, (int, float)):
            yield name, value


class Report:
    """What one training run shows and writes: a line of metrics, the bar, the recorded run.

    Every process calls its methods; the first one writes.
    """

    def __init__(self, state: State, out: Path, options: Options) -> None:
        self._state, self._out, self._options = state, out, options
        first, steps = state.group.first, state.recipe.steps
        self._metrics = Metrics(out, state.step, options.tensorboard) if first else None
        self._bar = tqdm(
            total=steps, initial=state.step, unit="step", disable=None if first else True
        )
        self._timed_from = state.step, time.perf_counter()

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update()

    def training(self, damaged: int) -> None:
        """Write the means over the steps since the last such line, which is moved here."""
        state = self._state
        timed, since = self._timed_from
        speed = (state.step - timed) * state.recipe.batch_size / (time.perf_counter() - since)
        loss, top1 = (state.group.mean(state.sums) / (state.step - state.logged)).tolist()
        state.sums.zero_()
        state.logged, self._timed_from = state.step, (state.step, time.perf_counter())
        self._bar.set_postfix(loss=f"{loss:.3f}", top1=f"{top1:.1%}", img_s=f"{speed:.0f}")
        if self._metrics is None:
            return
        self._metrics.write(
            state.step,
            loss=loss,
            top1=top1,
            learning_rate=state.optimizer.param_groups[0]["lr"],
            images_per_s=speed,
            damaged=damaged,
        )
        if self._bar.disable:
            _LOGGER.info(
                "step %d of %d: loss %.3f, top-1 %.1f %%, %.0f images/s",
                *(state.step, state.recipe.steps, loss, 100 * top1, speed),
            )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A time that does not count in the speed of training."""
        started = time.perf_counter()
        yield
        step, since = self._timed_from
        self._timed_from = step, since + time.perf_counter() - started

    def evaluation(self, accuracy: Accuracy) -> None:
        """Write an accuracy on the held-out images."""
        if self._metrics is not None:
            self._metrics.write(self._state.step, evaluation=dataclasses.asdict(accuracy))
            _LOGGER.info("step %d: held out: %s", self._state.step, accuracy)

    def is_evaluated(self) -> bool:
        """Whether the metrics have an evaluation of the present step."""
        rows = read_metrics(self._out / "metrics.jsonl")
        step = self._state.step
        return self._state.group.any_rank(
            any(row["step"] == step and "evaluation" in row for row in rows)
        )

    def finish(self, verdict: Verdict, dataset: str) -> None:
        """Close the reports; record a run that came to its end."""
        self._bar.close()
        if self._metrics is not None:
            self._metrics.write(self._state.step, verdict=str(verdict))
            self._metrics.close()
            if not verdict.stopped:
                with errors_logged("the recorded run"):
                    self._record(verdict, dataset)
            _LOGGER.info("%s: %s", self._state.recipe.name, verdict)
        self._state.group.barrier()

    def _record(self, verdict: Verdict, dataset: str) -> None:
        state, lines = self._state, []
        for row in read_metrics(self._out / "metrics.jsonl"):
            part, values = "training", row
            if "evaluation" in row:
                part, values = "held out", row["evaluation"]
            if "loss" in values:
                top5 = values.get("top5", float("nan"))
                lines.append((row["step"], part, values["loss"], values["top1"], top5))
        names = ("step", "part", "cross_entropy_nats", "top1", "top5")
        runs.write(
            self._options.experiment,
            state.recipe.name,
            {name: [line[place] for line in lines] for place, name in enumerate(names)},
            configuration={
                "recipe": dataclasses.asdict(state.recipe),
                "options": dataclasses.asdict(self._options),
                "processes": state.group.world,
            },
            seed=state.recipe.seed,
            dataset={"name": dataset, "sha256": state.identity["data"]},
            started=state.started,
            duration_s=state.seconds,
            verdict=str(verdict),
            root=self._out / "recorded",
        )


@contextlib.contextmanager
def errors_logged(what: str) -> Iterator[None]:
    """A file that cannot be written is logged as an error; training goes on without it."""
    try:
        yield
    except OSError as error:
        _LOGGER.error("%s cannot be written: %s", what, error)
