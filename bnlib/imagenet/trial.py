"""The fair trial: the paper's networks in miniature, each at its own best learning rate.

BN-Inception at a quarter of its width on 20 classes of Tiny ImageNet, mini-batches of 32.  What
the paper's comparison rests on is kept: many passes over the images, Inception five times as long
as the networks with the changed recipe, each annealed over its own length.  There are two arms:

* arm ``a``, the paper's relations: Inception at its own best rate, BN-Baseline at the same one,
  BN-x5, BN-x30 and BN-x5-Sigmoid at 5 and 30 times that rate;
* arm ``b``: each network at its own best rate.

The best rates are searched for every network with the same effort, and the search is recorded.
:mod:`bnlib.imagenet.miniature` is the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlib import runs
from bnlib.imagenet import fields
from bnlib.imagenet.fields import option
from bnlib.imagenet.recipes import ENSEMBLE, RECIPES, Recipe

__all__ = ["CHANGES", "PARTS", "SEARCHED", "Trial"]

#: The fields of the seven changes of section 4.2.1, by the name of the run without each.
CHANGES = {
    "learning-rate": "learning_rate",
    "dropout": "dropout",
    "l2": "weight_decay",
    "decay": "lr_decay_epochs",
    "lrn": "lrn",
    "shuffling": "within_shard_shuffling",
    "photometric": "photometric",
}
#: Networks whose best rate is searched.  BN-x30 is BN-x5 at another rate, so they share a search.
SEARCHED = ("bn-x5", "bn-x5-sigmoid", "inception", "bn-baseline")
_IMAGENET = 1_281_167  # training images
_SEARCH_SEED = 100  # no seed of a run that is reported


@dataclass(frozen=True)
class Trial:
    """What is made smaller, and for how long each network trains."""

    width: float = option(0.25, "factor on the channel counts of Figure 5", gt=0, le=1)
    image_size: int = option(32, "height and width of a crop, pixels", ge=32)
    stem_stride: int = option(4, "stride of the stem; the paper's is 8", choices=(8, 4))
    long_steps: int = option(50_000, "steps of Inception and BN-Baseline", ge=10)
    short_steps: int = option(10_000, "steps of the networks with the changed recipe", ge=10)
    edge_steps: int = option(1000, "steps of the runs that look for the edge of stability", ge=1)
    seeds: int = option(3, "seeds of every network", ge=1)
    experiment: str = option("imagenet-fair", "where the runs are recorded, in data/runs")

    def __post_init__(self) -> None:
        fields.check(self)

    def steps(self, recipe: Recipe) -> int:
        """The length of a recipe's training here: as in the paper, one of two."""
        longest = RECIPES["inception"].steps
        return self.long_steps if recipe.steps == longest else self.short_steps

    def scaled(self, recipe: Recipe, images: int, classes: int, **changes: Any) -> Recipe:
        """A recipe of the paper on a training set of so many images and classes, with changes.

        The rate falls over the run as far as the paper's recipe falls over its own, whatever the
        length (``steps``).  Each shard has as many images as the full recipe gives it.
        """
        steps = changes.pop("steps", self.steps(recipe))
        length, full = steps / images, recipe.steps / _IMAGENET
        small = recipe.replace(
            width=self.width,
            image_size=self.image_size,
            stem_stride=self.stem_stride,
            num_classes=classes,
            steps=steps,
            shards=max(1, images * recipe.shards // _IMAGENET),
            lr_decay_epochs=recipe.lr_decay_epochs * length / full,
            statistics_batches=20,
        )
        return small.replace(**changes)

    def evaluated_at(self, steps: int) -> list[int]:
        """The steps after which a run is evaluated: from 250 on, each about sqrt(2) times the last.

        The last is ``steps``.  The first is 1/200 of Inception's length, so that ratios of steps up
        to 200 can be seen.
        """
        first = min(250, steps)
        count = math.floor(2 * math.log2(steps / first))
        return sorted({*(round(first * 2 ** (k / 2)) for k in range(count + 1)), steps})

    def search(self, images: int, classes: int, root: Path) -> list[Recipe]:
        """The runs of the search for the best rates that can be made now; none when it is over.

        For each network: a grid of rates, each twice the last, at a tenth of the network's length;
        while the best one is at an end of the grid, one rate more beyond it; then the two best
        rates at a quarter of the length.
        """
        missing: list[Recipe] = []
        for network in SEARCHED:
            length = self.steps(RECIPES[network]) // 10
            found = self._searched(network, length, root)
            rates = self._grid(network, found)
            if rates <= found.keys():
                rates = set(sorted(found, key=lambda rate: -found[rate])[:2])
                length = self.steps(RECIPES[network]) // 4
                found = self._searched(network, length, root)
            missing += [
                self.scaled(
                    RECIPES[network],
                    images,
                    classes,
                    steps=length,
                    learning_rate=rate,
                    seed=_SEARCH_SEED,
                    name=f"{_search_name(network, length)}{rate:g}",
                )
                for rate in sorted(rates - found.keys())
            ]
        return missing

    def _grid(self, network: str, found: dict[float, float]) -> set[float]:
        start = 4 * RECIPES[network].learning_rate
        grid = {start * 2**k for k in (-1, 0, 1, 2)} | set(found)
        if grid <= found.keys():
            best = max(found, key=lambda rate: found[rate])
            if best == max(grid):
                grid.add(2 * best)
            elif best == min(grid):
                grid.add(best / 2)
        return grid

    def _searched(self, network: str, length: int, root: Path) -> dict[float, float]:
        """Recorded results of a network's search at one length: from rate to final accuracy."""
        found = {}
        pattern = f"{_search_name(network, length)}*/manifest.json"
        for path in sorted((root / self.experiment).glob(pattern)):
            run = runs.read(self.experiment, path.parent.name, root=root)
            rate = run.manifest["configuration"]["recipe"]["learning_rate"]
            top1 = run.where(part="held out")["top1"]
            found[rate] = float(top1[-1]) if run.verdict.finished else 0.0
        return found

    def best_rate(self, network: str, root: Path) -> float:
        """The rate that the recorded search chose; a ``RunError`` if the search is not over."""
        found = self._searched(network, self.steps(RECIPES[network]) // 4, root)
        if len(found) < 2:
            raise runs.RunError(
                f"the search for the rate of {network} is not recorded in {root}; "
                "run the search first"
            )
        return max(found, key=lambda rate: found[rate])

    def arms(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """Both arms, seed after seed; Inception belongs to both."""
        times = self.best_rate("inception", root) / RECIPES["inception"].learning_rate
        for seed in range(self.seeds):
            for network in ("inception", "bn-x5", "bn-x30", "bn-x5-sigmoid", "bn-baseline"):
                paper = RECIPES[network]
                rates = {"a": times * paper.learning_rate}
                if network in SEARCHED and network != "inception":
                    rates["b"] = self.best_rate(network, root)
                for arm, rate in rates.items():
                    name = f"{arm}-{network}-seed-{seed}"
                    yield self.scaled(
                        paper, images, classes, seed=seed, learning_rate=rate, name=name
                    )

    def sigmoid(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """Inception with sigmoids, to its end: at Inception's rate, and at five times that."""
        paper, base = RECIPES["inception-sigmoid"], self.best_rate("inception", root)
        for seed in range(self.seeds):
            for network, rate in (("inception-sigmoid", base), ("inception-sigmoid-x5", 5 * base)):
                name = f"a-{network}-seed-{seed}"
                yield self.scaled(paper, images, classes, seed=seed, learning_rate=rate, name=name)

    def edge(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """Constant rates, each twice the last, with and without normalization: which survive?"""
        del root
        for seed in range(self.seeds):
            for network in ("inception", "bn-x5"):
                for rate in (0.003 * 2**doubling for doubling in range(11)):
                    yield self.scaled(
                        RECIPES[network],
                        images,
                        classes,
                        seed=seed,
                        steps=self.edge_steps,
                        learning_rate=rate,
                        lr_decay=1.0,
                        name=f"edge-{network}-rate-{rate:g}-seed-{seed}",
                    )

    def longer(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """Half as many steps again: do the networks come near the end of what they can learn?"""
        for network in ("bn-x5", "inception"):
            yield self.scaled(
                RECIPES[network],
                images,
                classes,
                steps=3 * self.steps(RECIPES[network]) // 2,
                learning_rate=self.best_rate(network, root),
                name=f"longer-{network}-seed-0",
            )

    def ablation(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """BN-x5 of arm b without one of its seven changes, for each and for every seed."""
        base, changed = RECIPES["bn-baseline"], RECIPES["bn-x5"]
        rate = self.best_rate("bn-x5", root)
        for seed in range(self.seeds):
            for change, field in CHANGES.items():
                lower = rate * base.learning_rate / changed.learning_rate
                yield self.scaled(
                    changed.replace(**{field: getattr(base, field)}),
                    images,
                    classes,
                    seed=seed,
                    learning_rate=lower if field == "learning_rate" else rate,
                    name=f"ablation-{change}-seed-{seed}",
                )

    def members(self, images: int, classes: int, root: Path) -> Iterator[Recipe]:
        """The six networks of the ensemble, at the best rate of BN-x5 and BN-x30."""
        rate = self.best_rate("bn-x5", root)
        for number, member in enumerate(ENSEMBLE.values(), 1):
            name = f"member-{number}"
            yield self.scaled(member, images, classes, learning_rate=rate, name=name)


def _search_name(network: str, length: int) -> str:
    """Without the rate that follows."""
    return f"search-{network}-steps-{length}-rate-"


#: What is recorded besides the search, from a name to the recipes of its runs.
PARTS = {
    "arms": Trial.arms,
    "edge": Trial.edge,
    "sigmoid": Trial.sigmoid,
    "longer": Trial.longer,
    "ablation": Trial.ablation,
    "members": Trial.members,
}
