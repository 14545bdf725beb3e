"""Recorded runs: small metrics with a manifest that says where they come from.

A recorded run is a folder ``data/runs/<experiment>/<name>/`` with two files. ``metrics.csv`` is
a table whose columns are named with their units. ``manifest.json`` holds the command, the full
configuration, the seed, the data set's name and content hash, package versions, the device, when
it started and how long it took, the sha256 of the metrics, and the verdict. A chapter that
replays a run reads it through :func:`read`, which refuses a missing or an altered one.
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

    Attributes
    ----------
    kind
        "finished"; "diverged", when the loss is not finite, which is a result; or "stopped", with a
        checkpoint to go on from.
    step
        The steps done, for all but a run that finished.

    Raises
    ------
    ValueError
        If the kind is another, or it does not fit the step.
    """

    kind: str = "finished"
    step: int | None = None

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
        """Whether all steps were done."""
        return self.kind == "finished"

    @property
    def diverged(self) -> bool:
        """Whether the network diverged."""
        return self.kind == "diverged"

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped and can go on."""
        return self.kind == "stopped"


@dataclass(frozen=True)
class Run:
    """A recorded run, verified.

    Attributes
    ----------
    manifest
        The parsed ``manifest.json``.
    columns
        From column name to a one-dimensional array: float64 where every entry is a number,
        strings otherwise.
    """

    manifest: dict[str, Any]
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

        Parameters
        ----------
        **labels
            Constant columns put in front, which tell the runs apart once several frames are
            concatenated: ``pandas.concat(read("mnist-figure1", n).frame(network=n) for n in ...)``.

        Returns
        -------
        pandas.DataFrame
            Columns of whole numbers (a seed, a step) are int64, other numbers float64; the
            units stand in the columns' names.

        Raises
        ------
        ImportError
            If pandas is not installed.
        ValueError
            If a label has the name of a recorded column.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Run.frame() needs pandas, which is not installed; "
                "install it with `pip install pandas` or `pip install 'bnlib[book]'`"
            ) from error
        taken = [label for label in labels if label in self.columns]
        if taken:
            raise ValueError(f"the run has a column {taken[0]!r} already; name the label otherwise")
        recorded = {
            name: values.astype(np.int64) if _are_whole(values) else values
            for name, values in self.columns.items()
        }
        return pd.DataFrame({**labels, **recorded})


def data_folder() -> Path:
    """The project's ``data`` folder: beside the package in a checkout, else in the working folder.

    Raises
    ------
    RunError
        If there is neither.
    """
    beside = Path(__file__).resolve().parents[1] / "data"
    for folder in (beside, Path.cwd() / "data", Path.cwd().parent / "data"):
        if (folder / "paper").is_dir():
            return folder
    raise RunError(
        "the project's data folder was not found beside the package or in the working folder; "
        "run from a checkout of the project, or install it with `pip install -e .`"
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
    """Refuse what cannot name a run or an experiment.

    Raises
    ------
    ValueError
        If it cannot be the name of a folder.
    """
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} cannot name a run; give a name without slashes, such as 'six'")


def environment() -> dict[str, Any]:
    """Package versions and the device, for a manifest."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "device": _device_name()}


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
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
    command: str | None = None,
    root: Path | None = None,
) -> Path:
    """Record a run. Both files are written to a temporary name and renamed, the manifest last.

    Parameters
    ----------
    experiment, name
        The folder: ``<root>/<experiment>/<name>``.
    columns
        The metrics: equally long columns, named with their units. Numbers are written with up to
        six significant digits.
    configuration
        Everything that determines the run, as JSON values.
    seed
        The seed or seeds.
    dataset
        ``{"name": ..., "sha256": ...}``.
    started
        UTC, ISO 8601.
    duration_s
        Wall-clock seconds.
    verdict
        ``finished``, or ``diverged at step N``; see :class:`Verdict`.
    command
        The command that made it; this process's own by default.
    root
        ``data/runs`` of the project by default.

    Raises
    ------
    ValueError
        If there are no columns or they differ in length, or a name cannot be a folder's.
    """
    for folder_name in (experiment, name):
        check_name(folder_name)
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns must be there and equally long; got lengths {lengths}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(_cell(value) for value in row)
    metrics = text.getvalue().encode()
    manifest = {
        "schema": SCHEMA,
        "experiment": experiment,
        "name": name,
        "command": command or " ".join(["python", *sys.orig_argv[1:]]),
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
    write_atomically(
        folder / "manifest.json",
        (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(),
    )
    return folder


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{float(value):.6g}"
    return str(value)


def names(experiment: str, *, root: Path | None = None) -> list[str]:
    """The names of an experiment's recorded runs, sorted.

    Raises
    ------
    RunError
        If the experiment has no folder.
    """
    folder = (root or data_folder() / "runs") / experiment
    if not folder.is_dir():
        raise RunError(f"no recorded runs of {experiment!r}: {folder} does not exist")
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


def read(experiment: str, name: str, *, root: Path | None = None) -> Run:
    """Read a recorded run and verify it against its manifest.

    Parameters
    ----------
    experiment, name
        The run's folder under ``root``.
    root
        ``data/runs`` of the project by default.

    Raises
    ------
    RunError
        If a file is missing, the manifest is damaged or incomplete, or the metrics are not the
        ones that were recorded.
    """
    folder = (root or data_folder() / "runs") / experiment / name
    remedy = "restore the folder from version control, or record the run again"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        metrics = (folder / "metrics.csv").read_bytes()
    except FileNotFoundError as error:
        raise RunError(
            f"recorded run {experiment}/{name}: {error.filename} is missing; {remedy}"
        ) from error
    except ValueError as error:
        raise RunError(
            f"{folder / 'manifest.json'} is not valid JSON ({error}); {remedy}"
        ) from error
    lacking = [key for key in _REQUIRED if key not in manifest]
    if lacking:
        raise RunError(f"{folder / 'manifest.json'} lacks {', '.join(lacking)}; {remedy}")
    if manifest["schema"] != SCHEMA:
        raise RunError(
            f"{folder / 'manifest.json'} has schema {manifest['schema']}; this version of bnlib "
            f"reads {SCHEMA}; update bnlib or record the run again"
        )
    digest = hashlib.sha256(metrics).hexdigest()
    if digest != manifest["metrics_sha256"]:
        raise RunError(
            f"{folder / 'metrics.csv'} is not what was recorded: its sha256 is {digest}, the "
            f"manifest says {manifest['metrics_sha256']}; {remedy}"
        )
    rows = list(csv.reader(io.StringIO(metrics.decode())))
    header, body = rows[0], rows[1:]
    return Run(manifest, {name: _column(row[i] for row in body) for i, name in enumerate(header)})


def _column(values: Iterable[str]) -> np.ndarray:
    entries = list(values)
    try:
        return np.array([float(entry) for entry in entries])
    except ValueError:
        return np.array(entries)


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool(np.isfinite(values).all() and (values % 1 == 0).all())
