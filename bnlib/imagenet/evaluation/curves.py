"""What recorded runs of the ImageNet networks show: curves over seeds, and Figure 3 of the paper.

A recorded run is one network from one seed, named ``bn-x5`` or ``bn-x5-seed-2``; runs of the same
network are read together as :class:`Curves`, whether they are of the miniature or of full size.
pandas is needed::

    print(figure3("imagenet", ["inception", "bn-baseline", "bn-x5", "bn-x30"]))
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bnlib import runs

__all__ = [
    "PRINTED_LEVEL",
    "Curves",
    "figure3",
    "printed_figure3",
    "read_curves",
    "recorded_networks",
    "root_of",
    "steps_to_level",
]

#: The accuracy that Figure 3 counts steps to, which is the maximum of the plain Inception.
PRINTED_LEVEL = 0.722
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


@dataclass(frozen=True)
class Curves:
    """One network's curve from every seed that has been recorded.

    ``values`` has a row for every step that was evaluated and a column for every seed, indexed by
    them; it is NaN after a run that diverged.
    """

    network: str  #: its name, such as ``bn-x5``
    values: pd.DataFrame  #: what was measured
    recorded: tuple[runs.Run, ...]  #: the runs, in the order of the columns

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

    def steps_to(self, level: float) -> float:
        """Where the mean over seeds first reaches a level (see :func:`steps_to_level`)."""
        return steps_to_level(self.mean, level)

    def steps_to_each(self, level: float) -> list[float]:
        """Where every seed's own curve first reaches a level."""
        return [steps_to_level(curve, level) for _, curve in self.values.items()]

    def frame(self) -> pd.DataFrame:
        """Everything recorded, of every part: network, seed, and the columns of the runs."""
        each = zip(self.seeds, self.recorded, strict=True)
        frames = [run.frame(network=self.network, seed=seed) for seed, run in each]
        return pd.concat(frames, ignore_index=True)


def root_of(experiment: str, elsewhere: str | Path = "") -> Path:
    """The folder ``elsewhere`` if it holds recorded runs of the experiment, else ``data/runs``."""
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
    """Every recorded run of a network: ``<root>/<experiment>/<network>`` and ``...-seed-<k>``.

    Parameters
    ----------
    experiment, network
        Such as ``imagenet`` and ``bn-x5``.
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
    first = found[0].manifest["configuration"]["recipe"]
    for name, curve, run in zip(names, curves, found, strict=True):
        if not curve.index.equals(steps[: len(curve)]):
            raise ValueError(
                f"{experiment}/{name} was not evaluated at the steps of the other runs of "
                f"{network}; record it again with the same --eval-every and --log-every"
            )
        recipe = run.manifest["configuration"]["recipe"]
        for field, value in first.items():
            if field not in ("name", "seed") and recipe[field] != value:
                raise ValueError(
                    f"{experiment}/{name} has {field} {recipe[field]!r}, other runs of {network} "
                    f"{value!r}; give it a name of its own"
                )
    seeds = [run.manifest["seed"] for run in found]
    values = pd.concat([curve.reindex(steps) for curve in curves], axis=1, keys=seeds)
    return Curves(network, values, found)


def figure3(
    experiment: str,
    networks: Sequence[str],
    *,
    level: float | None = None,
    root: Path | None = None,
) -> pd.DataFrame:
    """Figure 3 from recorded runs of the miniature or of the paper's own size.

    Parameters
    ----------
    experiment
        Such as ``imagenet``.
    networks
        The rows, in their order.
    level
        The held-out accuracy to be reached, a fraction; by default the maximum of ``inception``, as
        the paper's 72.2% is.
    root
        ``data/runs`` of the project by default.

    Returns
    -------
    pandas.DataFrame
        A row a network, named ``network``, with

        * ``initial_learning_rate``, ``batch_size``: of the recipe that ran
        * ``seeds``: how many runs the row is the mean of
        * ``steps_to_level``: where the mean over seeds first reaches the level; infinite if never
        * ``steps_low``, ``steps_high``: the range of the seeds' own steps
        * ``speedup``: the steps of ``inception`` over this network's, each weighted with its
          mini-batch; NaN without runs of ``inception`` or if neither gets there
        * ``max_accuracy``, ``max_accuracy_at``: the highest point of the mean over seeds, a
          fraction, and its step
        * ``max_low``, ``max_high``: the range of the seeds' own maxima

    Raises
    ------
    RunError, ValueError
        As :func:`read_curves` does; also if there is neither a level nor a run of ``inception``.
    """
    base = math.nan  # examples
    if "inception" in recorded_networks(experiment, root=root):
        reference = read_curves(experiment, "inception", root=root)
        level = reference.mean.max() if level is None else level
        base = reference.steps_to(level) * reference.recipe["batch_size"]
    elif level is None:
        raise runs.RunError(
            f"{experiment!r} has no run of the baseline 'inception'; give the level to reach, such "
            "as the paper's 0.722"
        )
    rows = []
    for network in networks:
        curves = read_curves(experiment, network, root=root)
        mean, maxima = curves.mean, curves.values.max()
        steps, each = curves.steps_to(level), curves.steps_to_each(level)
        rows.append(
            {
                "network": network,
                "initial_learning_rate": curves.recipe["learning_rate"],
                "batch_size": curves.recipe["batch_size"],
                "seeds": len(curves.seeds),
                "steps_to_level": steps,
                "steps_low": min(each),
                "steps_high": max(each),
                "speedup": base / (steps * curves.recipe["batch_size"]),
                "max_accuracy": mean.max(),
                "max_accuracy_at": mean.idxmax() if mean.notna().any() else math.nan,
                "max_low": maxima.min(),
                "max_high": maxima.max(),
            }
        )
    return pd.DataFrame(rows)


def printed_figure3() -> pd.DataFrame:
    """Figure 3 as printed, from ``data/paper/figure3.csv``.

    A row a network, with its ``network`` name in the paper, its ``recipe`` here, and
    ``initial_learning_rate``, ``steps_to_level`` (to 72.2%), ``max_accuracy`` (a fraction),
    ``max_accuracy_at`` (a step); NaN where the paper prints nothing. ``learning_rate_is`` says
    whether the rate is "stated" or "implied" by the text.
    """
    path = runs.data_folder() / "paper" / "figure3.csv"
    return pd.read_csv(path).rename(columns={"steps_to_72.2": "steps_to_level"})
