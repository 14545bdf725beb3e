"""What recorded runs of the ImageNet networks show: curves, and their spread over seeds.

A recorded run is one network from one seed, named ``bn-x5`` or ``bn-x5-seed-2``; runs of the same
network are read together as :class:`Curves`, whether they are of the miniature or of full size.
pandas is needed (``pip install 'bnlib[book]'``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bnlib import runs

__all__ = ["Best", "Curves", "read_curves", "recorded_networks", "root_of", "steps_to_level"]

_NAME = re.compile(r"(?P<network>.+?)(?:-seed-(?P<seed>\d+))?")


def steps_to_level(curve: pd.Series, level: float) -> float:
    """The step at which a curve first reaches a level, by linear interpolation.

    Parameters
    ----------
    curve
        What was measured, over the steps of the evaluations, which increase; NaN reaches nothing.
    level
        In the unit of the curve.

    Returns
    -------
    float
        The step; infinite if the curve never reaches the level. A curve that is there at its first
        evaluation gives that evaluation's step, which is then an upper bound.
    """
    reached = (curve >= level).to_numpy()
    if not reached.any():
        return math.inf
    after = int(reached.argmax())
    step, value = float(curve.index[after]), curve.iloc[after]
    if after == 0 or math.isnan(curve.iloc[after - 1]):
        return step
    before, least = float(curve.index[after - 1]), curve.iloc[after - 1]
    return float(before + (level - least) / (value - least) * (step - before))


class Best(NamedTuple):
    """The highest point of a curve, and the step where it is first reached; NaN without a point."""

    value: float
    step: float


def _best(curve: pd.Series) -> Best:
    if not curve.notna().any():
        return Best(math.nan, math.nan)
    return Best(float(curve.max()), float(curve.idxmax()))


@dataclass(frozen=True)
class Curves:
    """One network's curve from every seed that has been recorded.

    Attributes
    ----------
    network
        Its name, such as ``bn-x5``.
    values
        A row for every step that was evaluated, a column for every seed, indexed by them; NaN
        after a run that diverged.
    recorded
        The runs, in the order of the columns.
    """

    network: str
    values: pd.DataFrame
    recorded: tuple[runs.Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order of the columns."""
        return tuple(self.values.columns)

    @property
    def mean(self) -> pd.Series:
        """The mean over seeds; NaN as soon as one of them has diverged."""
        return self.values.mean(axis=1, skipna=False)

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe; the seed and the name are those of the first run."""
        found: dict[str, Any] = self.recorded[0].manifest["configuration"]["recipe"]
        return found

    @property
    def diverged_at(self) -> tuple[int | None, ...]:
        """After how many steps each run diverged; None for one that did not."""
        verdicts = (run.verdict for run in self.recorded)
        return tuple(verdict.step if verdict.diverged else None for verdict in verdicts)

    def best(self) -> Best:
        """The highest point of the mean over seeds."""
        return _best(self.mean)

    def best_each(self) -> list[Best]:
        """The highest point of every seed's own curve."""
        return [_best(curve) for _, curve in self.values.items()]

    def steps_to(self, level: float) -> float:
        """Where the mean over seeds first reaches a level (see :func:`steps_to_level`)."""
        return steps_to_level(self.mean, level)

    def steps_to_each(self, level: float) -> list[float]:
        """Where every seed's own curve first reaches a level."""
        return [steps_to_level(curve, level) for _, curve in self.values.items()]

    def frame(self) -> pd.DataFrame:
        """Everything recorded, of every part: network, seed, and the columns of the runs."""
        return pd.concat(
            [
                run.frame(network=self.network, seed=seed)
                for seed, run in zip(self.seeds, self.recorded, strict=True)
            ],
            ignore_index=True,
        )


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
    found = tuple(runs.read(experiment, name, root=root) for name in names)
    curves = []
    for run in found:
        rows = run.frame().set_index("step")  # no rows if it diverged before the first
        curves.append(rows.loc[rows["part"] == part, column].astype(float))
    steps = max((curve.index for curve in curves), key=len)
    for name, curve, run in zip(names, curves, found, strict=True):
        if not curve.index.equals(steps[: len(curve)]):
            raise ValueError(
                f"{experiment}/{name} was not evaluated at the steps of the other runs of "
                f"{network}; record it again with the same --eval-every and --log-every"
            )
        _check_recipe(run, found[0], network)
    seeds = [run.manifest["seed"] for run in found]
    values = pd.concat([curve.reindex(steps) for curve in curves], axis=1, keys=seeds)
    return Curves(network, values, found)


def _check_recipe(run: runs.Run, first: runs.Run, network: str) -> None:
    recipe, expected = (each.manifest["configuration"]["recipe"] for each in (run, first))
    for field, value in expected.items():
        if field not in ("name", "seed") and recipe[field] != value:
            raise ValueError(
                f"{run.manifest['experiment']}/{run.manifest['name']} has {field} "
                f"{recipe[field]!r}, other runs of {network} {value!r}; give it a name of its own"
            )
