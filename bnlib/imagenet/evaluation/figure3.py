"""Figure 3 of the paper: as printed, and as recorded runs give it; and the speed of training.

The rows come from any experiment, the miniature of chapter 12 or runs of the paper's own size::

    from bnlib.imagenet.evaluation.figure3 import figure3
    for row in figure3("imagenet", ["inception", "bn-baseline", "bn-x5", "bn-x30"]):
        print(row.network, row.steps_to_level, row.max_accuracy)
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bnlib import runs
from bnlib.imagenet.evaluation.curves import read_curves, recorded_networks

__all__ = [
    "PRINTED_LEVEL",
    "Printed",
    "Row",
    "Speed",
    "figure3",
    "printed_figure3",
    "recorded_speed",
]


@dataclass(frozen=True)
class Row:
    """A row of Figure 3, measured.

    Attributes
    ----------
    network
        Its name, such as ``bn-x5``.
    initial_learning_rate
        Of the recipe that ran.
    batch_size
        Of the recipe that ran.
    seeds
        How many runs the row is the mean of.
    steps_to_level
        Where the mean over seeds first reaches the level; infinite if never.
    steps_range
        The least and the greatest of the seeds' own steps to the level.
    speedup
        The baseline's steps over this network's, each weighted with its mini-batch; NaN without a
        baseline or if neither gets there.
    max_accuracy
        The highest point of the mean over seeds, a fraction.
    max_accuracy_at
        Its step.
    max_range
        The least and the greatest of the seeds' own maxima.
    """

    network: str
    initial_learning_rate: float
    batch_size: int
    seeds: int
    steps_to_level: float
    steps_range: tuple[float, float]
    speedup: float
    max_accuracy: float
    max_accuracy_at: float
    max_range: tuple[float, float]


def figure3(
    experiment: str,
    networks: Sequence[str],
    *,
    level: float | None = None,
    baseline: str = "inception",
    root: Path | None = None,
) -> list[Row]:
    """The rows of Figure 3 from recorded runs.

    Parameters
    ----------
    experiment
        Such as ``imagenet``.
    networks
        The rows, in their order.
    level
        The held-out accuracy to be reached, a fraction; by default the maximum of the baseline, as
        the paper's 72.2% is.
    baseline
        The network that the others are compared with.
    root
        ``data/runs`` of the project by default.

    Raises
    ------
    RunError
        If a network has no runs, or there is neither a level nor a run of the baseline.
    ValueError
        As :func:`~bnlib.imagenet.evaluation.curves.read_curves` does.
    """
    there = recorded_networks(experiment, root=root)
    reference = read_curves(experiment, baseline, root=root) if baseline in there else None
    if level is None:
        if reference is None:
            raise runs.RunError(
                f"{experiment!r} has no run of the baseline {baseline!r}; give the level to reach, "
                "such as the paper's 0.722"
            )
        level = reference.best().value
    base = math.nan  # examples
    if reference is not None:
        base = reference.steps_to(level) * reference.recipe["batch_size"]
    rows = []
    for network in networks:
        curves = read_curves(experiment, network, root=root)
        each, best = curves.steps_to_each(level), curves.best()
        maxima = [point.value for point in curves.best_each()]
        steps, batch = curves.steps_to(level), curves.recipe["batch_size"]
        both_never = math.isinf(base) and math.isinf(steps)
        rows.append(
            Row(
                network=network,
                initial_learning_rate=curves.recipe["learning_rate"],
                batch_size=batch,
                seeds=len(curves.seeds),
                steps_to_level=steps,
                steps_range=(float(each.min()), float(each.max())),
                speedup=math.nan if both_never else base / (steps * batch),
                max_accuracy=best.value,
                max_accuracy_at=best.step,
                max_range=(min(maxima), max(maxima)),
            )
        )
    return rows


@dataclass(frozen=True)
class Printed:
    """A row of Figure 3 as the paper prints it; None where it prints nothing.

    Attributes
    ----------
    network
        The paper's name of it.
    recipe
        Its recipe here (:mod:`bnlib.imagenet.recipes`).
    initial_learning_rate
        As printed, or as the text implies.
    steps_to_level
        Steps to 72.2%.
    max_accuracy
        A fraction.
    max_accuracy_at
        The step that the text gives for it.
    learning_rate_is
        "stated" or "implied".
    """

    network: str
    recipe: str
    initial_learning_rate: float
    steps_to_level: float | None
    max_accuracy: float
    max_accuracy_at: float | None
    learning_rate_is: str


#: The accuracy that Figure 3 counts steps to, which is the maximum of the plain Inception.
PRINTED_LEVEL = 0.722


def printed_figure3(path: Path | None = None) -> list[Printed]:
    """Figure 3 as printed, from ``data/paper/figure3.csv``.

    Parameters
    ----------
    path
        Another file with these columns.
    """
    path = path or runs.data_folder() / "paper" / "figure3.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Printed(
                row["network"],
                row["recipe"],
                float(row["initial_learning_rate"]),
                _number(row["steps_to_72.2"]),
                float(row["max_accuracy"]),
                _number(row["max_accuracy_at"]),
                row["learning_rate_is"],
            )
            for row in csv.DictReader(file)
        ]


def _number(text: str) -> float | None:
    return float(text) if text else None


class Speed(NamedTuple):
    """How fast the network was seen to train.

    Attributes
    ----------
    images_per_s
        Images a second, forward and backward pass and update.
    mode
        How it ran.
    device
        Where.
    """

    images_per_s: float
    mode: str
    device: str


def recorded_speed(batch: int = 32, *, root: Path | None = None) -> Speed | None:
    """The fastest recorded training of our network on a GPU (experiment ``gpu-training``).

    Parameters
    ----------
    batch
        Examples of a mini-batch.
    root
        ``data/runs`` of the project by default.

    Returns
    -------
    Speed or None
        None if none has been recorded.
    """
    fastest: Speed | None = None
    try:
        names = runs.names("gpu-training", root=root)
    except runs.RunError:
        names = []
    for name in names:
        run = runs.read("gpu-training", name, root=root)
        if not {"network", "mode", "batch", "images_per_s"} <= run.columns.keys():
            continue  # another part of that experiment
        ours = run.where(network="ours", batch=batch)
        for mode, speed in zip(ours["mode"], ours["images_per_s"], strict=True):
            if fastest is None or speed > fastest.images_per_s:
                fastest = Speed(float(speed), str(mode), run.manifest["device"])
    return fastest
