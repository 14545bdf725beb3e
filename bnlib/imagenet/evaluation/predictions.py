"""Recorded evaluations: accuracies for Figure 4, and the probabilities that they come from.

With the probabilities of every held-out image, ensembles of any of the networks are computed
without a network or an image, as chapter 13 does.
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
    """The accuracy of one network or of an ensemble."""

    network: str  #: name of its recipe, or ``ensemble``
    models: int  #: networks whose probabilities are averaged
    crops: int  #: views of each image, 1, 10 or 144
    accuracy: Accuracy  #: over all images


class Predictions(NamedTuple):
    """What a network says about every held-out image."""

    probabilities: Tensor  #: float64 (n, classes), each row summing to one
    labels: Tensor  #: int64 (n,), the right classes


def record_accuracies(
    name: str,
    found: Sequence[Evaluated],
    *,
    recipes: Sequence[Recipe],
    source: Source,
    started: float,
    root: Path | None = None,
) -> Path:
    """Write accuracies, a row each, as a recorded run of the experiment ``imagenet-crops``.

    ``recipes`` are those of the networks, ``source`` has the held-out images, and ``started`` is
    what ``time.time()`` gave at the beginning. Returns the run's folder; in
    ``data/runs/imagenet-crops/`` chapter 13 shows it. Else as :func:`bnlib.runs.write`.
    """
    columns: dict[str, list[Any]] = {
        "network": [row.network for row in found],
        "models": [row.models for row in found],
        "crops": [row.crops for row in found],
        "n": [row.accuracy.n for row in found],
        "top1": [row.accuracy.top1 for row in found],
        "top5": [row.accuracy.top5 for row in found],
        "cross_entropy_nats": [row.accuracy.loss for row in found],
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
) -> Path:
    """Record what a trained network says about every held-out image, as a run of an experiment.

    The run has a row an image, in the source's order, and the columns ``label``, ``p0``, ``p1`` and
    so on: the mean probability over 1, 10 or 144 crops, with four significant digits. Its name is
    :func:`run_name` of the recipe's. An image that cannot be read is a ``ValueError``, as networks
    must be compared on the same images. ``run_folder`` is the path of
    :func:`~bnlib.imagenet.evaluation.accuracy.load_network`, ``data`` the location of
    :func:`~bnlib.imagenet.data.folders.open_source`.
    """
    started, source = time.time(), open_source(data, "val")
    network, recipe = load_network(run_folder, source)
    with processes(device) as group:
        found = torch.zeros(len(source), recipe.num_classes, device=group.device)
        network = network.to(group.device).to(memory_format=torch.channels_last)
        for part in predict([network], source, recipe.image_size, crops, group=group, batch=576):
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

    A run that is missing or altered is a ``RunError``.
    """
    run = runs.read(experiment, run_name(network, crops), root=root)
    columns = [torch.from_numpy(run[f"p{k}"]) for k in range(len(run.columns) - 1)]
    found = torch.stack(columns, 1)
    return Predictions(found / found.sum(1, keepdim=True), torch.from_numpy(run["label"]).long())
