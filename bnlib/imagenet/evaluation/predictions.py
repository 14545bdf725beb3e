"""Recorded evaluations: accuracies for Figure 4, and the probabilities that they come from.

With the probabilities of every held-out image, ensembles of any of the networks, other means and
calibration are computed without a network or an image, as chapter 13 does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlib import runs
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.evaluation.accuracy import Accuracy, load_network
from bnlib.imagenet.evaluation.inference import predict
from bnlib.imagenet.processes import processes
from bnlib.imagenet.recipes import Recipe

__all__ = [
    "ACCURACIES",
    "Evaluated",
    "Predictions",
    "read_probabilities",
    "record_accuracies",
    "record_probabilities",
    "run_name",
]

#: The experiment that ``python -m bnlib evaluate --record`` writes, and chapter 13 reads.
ACCURACIES = "imagenet-crops"


class Evaluated(NamedTuple):
    """What is evaluated: one network or an ensemble.

    Attributes
    ----------
    network
        Name of its recipe, or ``ensemble``.
    models
        Networks whose probabilities are averaged.
    crops
        Views of each image: 1, 10 or 144.
    accuracy
        What came out.
    """

    network: str
    models: int
    crops: int
    accuracy: Accuracy


class Predictions(NamedTuple):
    """What a network says about every held-out image.

    Attributes
    ----------
    probabilities
        float64 (n, classes), each row summing to one.
    labels
        int64 (n,), the right classes.
    """

    probabilities: Tensor
    labels: Tensor


def record_accuracies(
    name: str,
    found: Sequence[Evaluated],
    *,
    recipes: Sequence[Recipe],
    source: Source,
    started: float,
    root: Path | None = None,
) -> Path:
    """Write accuracies as a recorded run of the experiment ``imagenet-crops``.

    Parameters
    ----------
    name
        Of the run.
    found
        A row each.
    recipes
        Of the networks; their seeds are those of the run.
    source
        The held-out images.
    started
        When it began: seconds since the epoch, as ``time.time()`` gives them.
    root
        As in :func:`bnlib.runs.write`.

    Returns
    -------
    pathlib.Path
        The run's folder; move it to ``data/runs/imagenet-crops/`` for chapter 13 to show it.

    Raises
    ------
    ValueError
        As :func:`bnlib.runs.check_name` does.
    """
    scores = [row.accuracy for row in found]
    columns: dict[str, list[Any]] = {
        "network": [row.network for row in found],
        "models": [row.models for row in found],
        "crops": [row.crops for row in found],
        "n": [score.n for score in scores],
        "top1": [score.top1 for score in scores],
        "top5": [score.top5 for score in scores],
        "cross_entropy_nats": [score.loss for score in scores],
    }
    return runs.write(ACCURACIES, name, columns, **_manifest(recipes, source, started), root=root)


def _manifest(recipes: Sequence[Recipe], source: Source, started: float) -> dict[str, Any]:
    return {
        "configuration": {"recipes": [dataclasses.asdict(recipe) for recipe in recipes]},
        "seed": [recipe.seed for recipe in recipes],
        "dataset": {"name": source.location, "sha256": source.fingerprint()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "duration_s": time.time() - started,
    }


def run_name(network: str, crops: int) -> str:
    """The name of the recorded run with a network's probabilities."""
    return f"probabilities-{network}-{crops}"


def record_probabilities(
    run_folder: str | Path,
    data: str | Path,
    crops: int,
    experiment: str,
    root: Path | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    batch: int = 576,
) -> Path:
    """Record what a trained network says about every held-out image.

    The run has a row an image, in the source's order, and the columns ``label``, ``p0``, ``p1`` and
    so on: the mean probability over the crops, with four significant digits.

    Parameters
    ----------
    run_folder
        A run's folder or its ``network.pt``, as in
        :func:`~bnlib.imagenet.evaluation.accuracy.load_network`.
        The recipe's name becomes part of the recording's, by :func:`run_name`.
    data
        As in :func:`~bnlib.imagenet.data.folders.open_source`; its held-out part is used.
    crops
        1, 10 or 144.
    experiment, root
        As in :func:`bnlib.runs.write`.
    device
        "auto", "cpu", "cuda" or another device of torch.
    workers, batch
        As in :func:`~bnlib.imagenet.evaluation.inference.predict`.

    Returns
    -------
    pathlib.Path
        The recording's folder.

    Raises
    ------
    ValueError
        If an image cannot be read: networks must be compared on the same images.
    """
    started, source = time.time(), open_source(data, "val")
    network, recipe = load_network(run_folder, source)
    with processes(device) as group:
        found = torch.zeros(len(source), recipe.num_classes, device=group.device)
        network = network.to(group.device).to(memory_format=torch.channels_last)
        for part in predict(
            [network], source, recipe.image_size, crops, group=group, workers=workers, batch=batch
        ):
            found[part.indices] = part.log_probabilities[0].exp()
        group.sum(found)
    if unread := (found.sum(1) == 0).nonzero()[:, 0].tolist():
        names = ", ".join(map(source.name, unread))
        raise ValueError(f"cannot be read, so that nothing is recorded: {names}")
    columns: dict[str, list[Any]] = {
        f"p{k}": [float(f"{value:.4g}") for value in column]
        for k, column in enumerate(found.T.tolist())
    }
    return runs.write(
        experiment,
        run_name(recipe.name, crops),
        {"label": source.labels.tolist()} | columns,
        **_manifest([recipe], source, started),
        root=root,
    )


def read_probabilities(
    network: str, crops: int, experiment: str, *, root: Path | None = None
) -> Predictions:
    """What :func:`record_probabilities` wrote; what rounding left is spread, so that rows sum to 1.

    Parameters
    ----------
    network
        Name of its recipe.
    crops
        1, 10 or 144.
    experiment, root
        As in :func:`bnlib.runs.read`.

    Raises
    ------
    bnlib.runs.RunError
        As :func:`bnlib.runs.read` does.
    """
    run = runs.read(experiment, run_name(network, crops), root=root)
    columns = [run[f"p{k}"] for k in range(len(run.columns) - 1)]
    found = torch.stack([torch.from_numpy(column) for column in columns], 1)
    labels = torch.from_numpy(run["label"]).long()
    return Predictions(found / found.sum(1, keepdim=True), labels)
