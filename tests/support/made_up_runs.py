"""Recorded runs in which nothing was trained, as the trainer would write them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnlib import runs
from bnlib.imagenet import RECIPES

MADE_UP = {"name": "made up for a test, nothing was trained", "sha256": "0" * 64}


def make_up(
    root: Path,
    name: str,
    top1: Sequence[float],
    *,
    every: int = 100,
    experiment: str = "imagenet",
    verdict: str = "finished",
    seed: int = 0,
    network: str | None = None,
    **recipe: Any,
) -> None:
    """A recorded run with these held-out accuracies, as the trainer would write it."""
    network = network or name.partition("-seed-")[0]
    chosen = RECIPES.get(network, RECIPES["bn-x5"]).replace(name=name, seed=seed, **recipe)
    steps = [every * (number + 1) for number in range(len(top1))]
    rows = [
        (step, "held out", 1 - value, value, value) for step, value in zip(steps, top1, strict=True)
    ]
    rows += [
        (step, "training", 2 - value, value, math.nan)
        for step, value in zip(steps, top1, strict=True)
    ]
    names = ("step", "part", "cross_entropy_nats", "top1", "top5")
    columns = list(zip(*sorted(rows), strict=True)) or [()] * 5
    runs.write(
        experiment,
        name,
        dict(zip(names, columns, strict=True)),
        configuration={"recipe": dataclasses.asdict(chosen)},
        seed=seed,
        dataset=MADE_UP,
        started="2026-01-01T00:00:00Z",
        duration_s=0,
        verdict=verdict,
        root=root,
    )
