"""What recorded runs of the ImageNet networks show: curves, and their spread over seeds.

A recorded run is one network from one seed, named ``bn-x5`` or ``bn-x5-seed-2``; runs of the same
network are read together as :class:`Curves`, whether they are of the miniature or of full size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnlib import runs

__all__ = [
    "Best",
    "Curves",
    "first_reach",
    "read_curves",
    "recorded_networks",
    "root_of",
]

_NAME = re.compile(r"(?P<network>.+?)(?:-seed-(?P<seed>\d+))?")
_DIVERGED = re.compile(r"diverged at step (\d+)")


def first_reach(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """The step at which a curve first reaches a level, by linear interpolation.

    Parameters
    ----------
    steps
        Steps of the evaluations, increasing, (S,).
    values
        What was measured there, (S,); NaN reaches nothing.
    level
        In the unit of ``values``.

    Returns
    -------
    float
        The step; infinite if the curve never reaches the level.  A curve that is there at its first
        evaluation gives that evaluation's step, which is then an upper bound.

    Raises
    ------
    ValueError
        If the two arrays are not one-dimensional and equally long.
    """
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if steps.ndim != 1 or steps.shape != values.shape:
        raise ValueError(
            f"steps and values must be equally long vectors; got {steps.shape} and {values.shape}"
        )
    there = values >= level
    if not there.any():
        return math.inf
    after = int(there.argmax())
    if after == 0 or np.isnan(values[after - 1]):
        return float(steps[after])
    rise = values[after] - values[after - 1]
    part = (level - values[after - 1]) / rise
    return float(steps[after - 1] + part * (steps[after] - steps[after - 1]))


class Best(NamedTuple):
    """The highest point of a curve.

    Attributes
    ----------
    value
        In the curve's unit; NaN if the curve has no point.
    step
        Where it is first reached; NaN if the curve has no point.
    """

    value: float
    step: float


def _best(steps: np.ndarray, values: np.ndarray) -> Best:
    if not np.isfinite(values).any():
        return Best(math.nan, math.nan)
    highest = int(np.nanargmax(values))
    return Best(float(values[highest]), float(steps[highest]))


@dataclass(frozen=True)
class Curves:
    """One network's curve from every seed that has been recorded.

    Attributes
    ----------
    network
        Its name, such as ``bn-x5``.
    steps
        Steps of the evaluations, float64 (S,).
    values
        One row a seed, float64 (seeds, S); NaN after a run that diverged.
    seeds
        The seeds, in the order of the rows.
    manifests
        The manifests of the runs, in the same order (see :mod:`bnlib.runs`).
    """

    network: str
    steps: np.ndarray
    values: np.ndarray
    seeds: tuple[int, ...]
    manifests: tuple[dict[str, Any], ...]

    @property
    def mean(self) -> np.ndarray:
        """The mean over seeds, (S,); NaN as soon as one of them has diverged."""
        return self.values.mean(0)

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe; the seed and the name are those of the first run."""
        found: dict[str, Any] = self.manifests[0]["configuration"]["recipe"]
        return found

    @property
    def diverged_at(self) -> tuple[int | None, ...]:
        """After how many steps each run diverged; None for one that did not."""
        matches = (_DIVERGED.fullmatch(manifest["verdict"]) for manifest in self.manifests)
        return tuple(int(match[1]) if match else None for match in matches)

    def best(self) -> Best:
        """The highest point of the mean over seeds."""
        return _best(self.steps, self.mean)

    def best_each(self) -> list[Best]:
        """The highest point of every seed's own curve."""
        return [_best(self.steps, values) for values in self.values]

    def steps_to(self, level: float) -> float:
        """Where the mean over seeds first reaches a level (see :func:`first_reach`)."""
        return first_reach(self.steps, self.mean, level)

    def steps_to_each(self, level: float) -> np.ndarray:
        """Where every seed's own curve first reaches a level, (seeds,)."""
        return np.array([first_reach(self.steps, values, level) for values in self.values])


def root_of(experiment: str, elsewhere: str | Path = "") -> Path:
    """The folder of recorded runs to read an experiment from.

    Parameters
    ----------
    experiment
        Such as ``imagenet``.
    elsewhere
        A folder that is taken if it holds the experiment; else it is the project's ``data/runs``.
    """
    if str(elsewhere) and (Path(elsewhere) / experiment).is_dir():
        return Path(elsewhere)
    return runs.data_folder() / "runs"


def recorded_networks(experiment: str, *, root: Path | None = None) -> list[str]:
    """The networks of which an experiment has runs, sorted; none if there is no such experiment."""
    try:
        names = runs.names(experiment, root=root)
    except runs.RunError:
        return []
    return sorted({_parse(name)[0] for name in names})


def _parse(name: str) -> tuple[str, int]:
    match = _NAME.fullmatch(name)
    assert match  # any name but the empty one does
    return match["network"], int(match["seed"] or -1)


def read_curves(
    experiment: str,
    network: str,
    *,
    part: str = "held out",
    column: str = "top1",
    root: Path | None = None,
) -> Curves:
    """Every recorded run of a network.

    Parameters
    ----------
    experiment, network
        The runs are ``<root>/<experiment>/<network>`` and ``<network>-seed-<k>``.
    part
        "held out" or "training".
    column
        ``top1``, ``top5`` or ``cross_entropy_nats``.
    root
        ``data/runs`` of the project by default.

    Raises
    ------
    RunError
        If there is no such run, or one is altered.
    ValueError
        If two runs were not evaluated at the same steps, or differ in their recipe.
    """
    names = [name for name in runs.names(experiment, root=root) if _parse(name)[0] == network]
    if not names:
        there = ", ".join(recorded_networks(experiment, root=root)) or "none"
        raise runs.RunError(
            f"no recorded run of {network!r} in {experiment!r}; there are runs of: {there}"
        )
    names.sort(key=lambda name: _parse(name)[1])
    found = [runs.read(experiment, name, root=root) for name in names]
    points = [_points(run, part, column) for run in found]
    steps = max((each[0] for each in points), key=len)
    values = np.full((len(found), len(steps)), math.nan)
    for row, (name, (at, measured)) in enumerate(zip(names, points, strict=True)):
        if not np.array_equal(at, steps[: len(at)]):
            raise ValueError(
                f"{experiment}/{name} was not evaluated at the steps of the other runs of "
                f"{network}; record it again with the same --eval-every and --log-every"
            )
        values[row, : len(at)] = measured
    curves = Curves(
        network,
        steps,
        values,
        tuple(run.manifest["seed"] for run in found),
        tuple(run.manifest for run in found),
    )
    _same_recipe(experiment, curves)
    return curves


def _points(run: runs.Run, part: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    if not len(run["part"]):  # diverged before anything was written down
        return np.empty(0), np.empty(0)
    rows = run.where(part=part)
    return rows["step"], rows[column]


def _same_recipe(experiment: str, curves: Curves) -> None:
    for manifest in curves.manifests:
        recipe = manifest["configuration"]["recipe"]
        for field, value in curves.recipe.items():
            if field not in ("name", "seed") and recipe[field] != value:
                raise ValueError(
                    f"{experiment}/{manifest['name']} has {field} {recipe[field]!r}, other runs of "
                    f"{curves.network} {value!r}; give it a name of its own"
                )
