"""Figure 3 of the paper: as printed, and as recorded runs give it.

The rows come from any experiment, the miniature of chapter 12 or runs of the paper's own size::

    from bnlib.imagenet.evaluation.figure3 import figure3

    print(figure3("imagenet", ["inception", "bn-baseline", "bn-x5", "bn-x30"]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bnlib import runs
from bnlib.imagenet.evaluation.curves import read_curves, recorded_networks

__all__ = ["PRINTED_LEVEL", "figure3", "printed_figure3"]

#: The accuracy that Figure 3 counts steps to, which is the maximum of the plain Inception.
PRINTED_LEVEL = 0.722


def figure3(
    experiment: str,
    networks: Sequence[str],
    *,
    level: float | None = None,
    baseline: str = "inception",
    root: Path | None = None,
) -> pd.DataFrame:
    """Figure 3 from recorded runs.

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

    Returns
    -------
    pandas.DataFrame
        A row a network, named ``network``, with

        * ``initial_learning_rate``, ``batch_size``: of the recipe that ran
        * ``seeds``: how many runs the row is the mean of
        * ``steps_to_level``: where the mean over seeds first reaches the level; infinite if never
        * ``steps_low``, ``steps_high``: the range of the seeds' own steps
        * ``speedup``: the baseline's steps over this network's, each weighted with its mini-batch;
          NaN without a baseline or if neither gets there
        * ``max_accuracy``, ``max_accuracy_at``: the highest point of the mean over seeds, a
          fraction, and its step
        * ``max_low``, ``max_high``: the range of the seeds' own maxima

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
        steps, batch = curves.steps_to(level), curves.recipe["batch_size"]
        each, best = curves.steps_to_each(level), curves.best()
        maxima = [point.value for point in curves.best_each()]
        both_never = math.isinf(base) and math.isinf(steps)
        rows.append(
            {
                "network": network,
                "initial_learning_rate": curves.recipe["learning_rate"],
                "batch_size": batch,
                "seeds": len(curves.seeds),
                "steps_to_level": steps,
                "steps_low": min(each),
                "steps_high": max(each),
                "speedup": math.nan if both_never else base / (steps * batch),
                "max_accuracy": best.value,
                "max_accuracy_at": best.step,
                "max_low": min(maxima),
                "max_high": max(maxima),
            }
        )
    return pd.DataFrame(rows)


def printed_figure3() -> pd.DataFrame:
    """Figure 3 as printed, from ``data/paper/figure3.csv``.

    Returns
    -------
    pandas.DataFrame
        A row a network, with its ``network`` name in the paper, its ``recipe`` here, and
        ``initial_learning_rate``, ``steps_to_level`` (to 72.2%), ``max_accuracy`` (a fraction),
        ``max_accuracy_at`` (a step); NaN where the paper prints nothing. ``learning_rate_is`` says
        whether the rate is "stated" or "implied" by the text.
    """
    path = runs.data_folder() / "paper" / "figure3.csv"
    return pd.read_csv(path).rename(columns={"steps_to_72.2": "steps_to_level"})
