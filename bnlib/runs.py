"""Recorded runs: small metrics with a manifest that says where they come from.

A recorded run is a folder ``data/runs/<experiment>/<name>/`` with two files. ``metrics.csv`` is
a table whose columns are named with their units. ``manifest.json`` holds what determined it, where
and when it ran, the sha256 of the metrics, and the verdict. :func:`read` refuses a missing or an
altered run.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
_PACKAGES = ("bnlib", "numpy", "torch", "torchvision", "scikit-learn")
_VERDICTS = ("finished", "diverged", "stopped")
_REQUIRED = (
    "schema experiment name command configuration seed dataset versions device started "
    "duration_s metrics_sha256 rows verdict"
).split()


class RunError(RuntimeError):
    """A recorded run is missing, altered or incomplete; the message says which and what to do."""


@dataclass(frozen=True)
class Verdict:
    """How a run ended; ``str()`` of it is what a manifest holds, :meth:`parse` reads that back.

    A run that *diverged* had a loss that is not finite, which is a result; one that *stopped* has a
    checkpoint to go on from. A ValueError refuses another kind, or a step that does not fit it.
    """

    kind: str = "finished"  #: "finished", "diverged" or "stopped"
    step: int | None = None  #: the steps done, for all but a run that finished

    def __post_init__(self) -> None:
        if self.kind not in _VERDICTS or (self.step is None) != (self.kind == "finished"):
            raise ValueError(
                f"a verdict is {self.kind!r} at step {self.step}; it must be finished without a "
                "step, or diverged or stopped with one"
            )

    def __str__(self) -> str:
        return self.kind if self.step is None else f"{self.kind} at step {self.step}"

    @classmethod
    def parse(cls, text: str) -> Verdict:
        """The verdict of a manifest."""
        kind, _, step = text.partition(" at step ")
        return cls(kind, int(step) if step.isdecimal() else None)

    @property
    def finished(self) -> bool:
        return self.kind == "finished"

    @property
    def diverged(self) -> bool:
        return self.kind == "diverged"

    @property
    def stopped(self) -> bool:
        return self.kind == "stopped"


@dataclass(frozen=True)
class Run:
    """A recorded run, verified."""

    manifest: dict[str, Any]  #: the parsed ``manifest.json``
    #: one-dimensional, float64 where every entry is a number, else strings
    columns: dict[str, np.ndarray]

    @property
    def verdict(self) -> Verdict:
        """How it ended."""
        return Verdict.parse(self.manifest["verdict"])

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self.columns:
            raise KeyError(
                f"run {self.manifest['experiment']}/{self.manifest['name']} has no column "
                f"{column!r}; it has {', '.join(self.columns)}"
            )
        return self.columns[column]

    def where(self, **conditions: Any) -> Run:
        """The rows in which every named column equals the given value."""
        mask = np.ones(len(next(iter(self.columns.values()))), dtype=bool)
        for column, value in conditions.items():
            mask &= self[column] == value
        return Run(self.manifest, {name: values[mask] for name, values in self.columns.items()})

    def frame(self, **labels: Any) -> pd.DataFrame:
        """The run as a tidy DataFrame: one row an observation, the columns named as recorded.

        Columns of whole numbers (a seed, a step) are int64, other numbers float64. ``labels`` are
        constant columns put in front, which tell the runs apart once several frames are
        concatenated: ``pandas.concat(read("mnist-figure1", n).frame(network=n) for n in ...)``.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Run.frame() needs pandas: pip install pandas") from error
        taken = [label for label in labels if label in self.columns]
        if taken:
            raise ValueError(f"the run has a column {taken[0]!r} already; name the label otherwise")
        recorded = {
            name: values.astype(np.int64) if _are_whole(values) else values
            for name, values in self.columns.items()
        }
        return pd.DataFrame({**labels, **recorded})


def data_folder() -> Path:
    """The project's ``data`` folder: beside the package in a checkout, within it if installed."""
    package = Path(__file__).resolve().parent
    places = (package.parent / "data", package / "data", Path("data"), Path("..", "data"))
    for folder in map(Path.absolute, places):
        if (folder / "paper").is_dir():
            return folder
    raise RunError(
        "the project's data folder was not found: not beside the package, nor in it, nor in the "
        "working folder; run from a checkout of the project"
    )


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to a temporary name beside ``path``, flush it to disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raise a ValueError for what cannot name a run or an experiment, as it names a folder."""
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} cannot name a run; give a name without slashes, such as 'six'")


def environment() -> dict[str, Any]:
    """Package versions and the device, for a manifest."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"versions": versions, "device": _device_name()}


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"CPU: {model}, {torch.get_num_threads()} threads"


def write(
    experiment: str,
    name: str,
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    *,
    configuration: Mapping[str, Any],
    seed: int | Sequence[int],
    dataset: Mapping[str, str],
    started: str,
    duration_s: float,
    verdict: str | Verdict = "finished",
    root: Path | None = None,
) -> Path:
    """Record a run in the folder ``<root>/<experiment>/<name>``, which is returned.

    Both files are written to a temporary name and renamed, the manifest last. Its command is that
    of this process.

    Parameters
    ----------
    columns
        The metrics: equally long columns, named with their units. Numbers are written with up to
        six significant digits.
    configuration
        Everything that determines the run, as JSON values.
    dataset
        ``{"name": ..., "sha256": ...}``.
    started
        UTC, ISO 8601.
    root
        ``data/runs`` of the project by default.

    Raises
    ------
    ValueError
        If there are no columns or they differ in length, or a name cannot be a folder's.
    """
    check_name(experiment)
    check_name(name)
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns must be there and equally long; got lengths {lengths}")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row)
    metrics = table.getvalue().encode()
    manifest = {
        "schema": SCHEMA,
        "experiment": experiment,
        "name": name,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "configuration": dict(configuration),
        "seed": seed if isinstance(seed, int) else list(seed),
        "dataset": dict(dataset),
        **environment(),
        "started": started,
        "duration_s": round(duration_s, 1),
        "metrics_sha256": hashlib.sha256(metrics).hexdigest(),
        "rows": next(iter(lengths.values())),
        "verdict": str(verdict),
    }
    folder = (root or data_folder() / "runs") / experiment / name
    write_atomically(folder / "metrics.csv", metrics)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "manifest.json", text.encode())
    return folder


def names(experiment: str, *, root: Path | None = None) -> list[str]:
    """The names of an experiment's recorded runs, sorted; a RunError if it has no folder."""
    folder = (root or data_folder() / "runs") / experiment
    if not folder.is_dir():
        raise RunError(f"no recorded runs of {experiment!r}: {folder} does not exist")
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


def read(experiment: str, name: str, *, root: Path | None = None) -> Run:
    """Read a recorded run, by default of the project's ``data/runs``, and verify it.

    Raises
    ------
    RunError
        If a file is missing, the manifest is damaged or incomplete, or the metrics are not the
        ones that were recorded.
    """
    folder = (root or data_folder() / "runs") / experiment / name
    path = folder / "manifest.json"
    remedy = "restore the folder from version control, or record the run again"
    try:
        manifest = json.loads(path.read_bytes())
        metrics = (folder / "metrics.csv").read_bytes()
    except FileNotFoundError as error:
        raise RunError(
            f"recorded run {experiment}/{name}: {error.filename} is missing; {remedy}"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); {remedy}") from error
    lacking = [key for key in _REQUIRED if key not in manifest]
    if lacking:
        raise RunError(f"{path} lacks {', '.join(lacking)}; {remedy}")
    if manifest["schema"] != SCHEMA:
        raise RunError(
            f"{path} has schema {manifest['schema']}; this version of bnlib "
            f"reads {SCHEMA}; update bnlib or record the run again"
        )
    digest = hashlib.sha256(metrics).hexdigest()
    if digest != manifest["metrics_sha256"]:
        raise RunError(
            f"{folder / 'metrics.csv'} is not what was recorded: its sha256 is {digest}, the "
            f"manifest says {manifest['metrics_sha256']}; {remedy}"
        )
    header, *rows = csv.reader(io.StringIO(metrics.decode()))
    return Run(manifest, {name: _column(row[i] for row in rows) for i, name in enumerate(header)})


def _column(values: Iterable[str]) -> np.ndarray:
    entries = np.array(list(values))
    try:
        return entries.astype(np.float64)
    except ValueError:
        return entries


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool(np.isfinite(values).all() and (values % 1 == 0).all())
