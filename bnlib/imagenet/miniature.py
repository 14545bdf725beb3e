"""The paper's networks in miniature, on photographs of Tiny ImageNet: the runs behind chapters 12
and 13.

Tiny ImageNet is 200 of ImageNet's classes at 64x64 pixels.  Here 20 of them, crops of 32x32 and
800 steps.  The stem is without its first max pooling, or the last maps would be of one pixel, and
batch normalization would there see 32 values.  The rest of the networks, the mini-batches of 32 and
the ratios between the recipes are the paper's.  Record everything again (about three hours on two
cores)::

    python -m bnlib.imagenet.miniature prepare --tiny tiny-imagenet-200 --data tiny-imagenet-20
    python -m bnlib.imagenet.miniature sweep networks ablation members crops --data tiny-imagenet-20

On a GPU, larger, with several runs sharing it::

    python -m bnlib.imagenet.miniature prepare --tiny tiny-imagenet-200 --data tiny-imagenet-100 \\
        --classes 100
    python -m bnlib.imagenet.miniature sweep networks ablation members crops \\
        --data tiny-imagenet-100 --image-size 64 --steps 15000 --jobs 4 --experiment imagenet-100

A run that is recorded is not repeated; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bnlib import runs
from bnlib.imagenet import fields
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SourceError
from bnlib.imagenet.evaluation.crops import CROPS
from bnlib.imagenet.evaluation.predictions import record_probabilities, run_name
from bnlib.imagenet.fields import option
from bnlib.imagenet.options import Options
from bnlib.imagenet.recipes import ENSEMBLE, RECIPES, Recipe
from bnlib.imagenet.training.loop import train

__all__ = ["ABLATION", "Miniature", "prepare"]

#: The fields that chapter 12 takes back from BN-x5 to their values in BN-Baseline, one change of
#: section 4.2.1 at a time.
ABLATION = {
    "learning-rate": ("learning_rate",),
    "dropout": ("dropout",),
    "l2": ("weight_decay",),
    "decay": ("lr_decay_epochs",),
    "lrn": ("lrn",),
    "shuffling": ("within_shard_shuffling",),
    "photometric": ("photometric",),
}
_PAPER_EPOCHS = RECIPES["bn-x30"].steps * 32 / 1_281_167
_PAPER_RATE = RECIPES["inception"].learning_rate


@dataclass(frozen=True)
class Miniature:
    """What is made smaller, and the learning rate that goes with it.

    Raises
    ------
    TypeError, ValueError
        If a value has the wrong type or is out of range.
    """

    image_size: int = option(32, "height and width of a crop, pixels", ge=32)
    steps: int = option(800, "training steps of every network", ge=10)
    rate: float = option(
        0.006, "learning rate in place of the paper's 0.0015: the sweep's best", gt=0
    )
    stem_stride: int = option(4, "stride of the stem; the paper's is 8", choices=(8, 4))
    rates: str = option("0.003 0.006 0.012 0.024", "learning rates of the sweep")
    seeds: int = option(3, "seeds of every network", ge=1)
    experiment: str = option("imagenet-miniature", "where the runs are recorded, in data/runs")

    def __post_init__(self) -> None:
        fields.check(self)
        try:
            found = [float(rate) for rate in self.rates.split()]
        except ValueError:
            found = []
        if not found or not all(0 < rate < float("inf") for rate in found):
            raise ValueError(
                f"rates is {self.rates!r}; it must be positive numbers with spaces between them"
            )

    def scaled(self, recipe: Recipe, images: int, classes: int, **changes: object) -> Recipe:
        """A recipe of the paper on a small data set.

        The learning rate is multiplied as the base rate is, so that the ratios between recipes
        stay.  The decay is such that over its steps BN-x5's rate falls as far as the paper's does
        over six million; without the change of section 4.2.1 it falls six times more slowly.  Each
        shard has as many images as the full recipe gives it.

        Parameters
        ----------
        recipe
            One of the paper's.
        images, classes
            Of the training set.
        **changes
            Fields of the recipe to be set after all this.
        """
        epochs = self.steps * recipe.batch_size / images
        small = recipe.replace(
            image_size=self.image_size,
            stem_stride=self.stem_stride,
            num_classes=classes,
            steps=self.steps,
            statistics_batches=20,
            shards=max(1, images * recipe.shards // 1_281_167),
            learning_rate=recipe.learning_rate * self.rate / _PAPER_RATE,
            lr_decay_epochs=recipe.lr_decay_epochs * epochs / _PAPER_EPOCHS,
        )
        return small.replace(**changes)

    def sweep(self, images: int, classes: int) -> list[Recipe]:
        """The plain Inception at every learning rate, and at the best with BN's faster decay."""
        plain = RECIPES["inception"]
        found = [
            self.scaled(plain, images, classes, learning_rate=rate, name=f"sweep-{rate:g}")
            for rate in map(float, self.rates.split())
        ]
        fast = plain.replace(lr_decay_epochs=RECIPES["bn-x5"].lr_decay_epochs)
        return [*found, self.scaled(fast, images, classes, name=f"sweep-{self.rate:g}-fast-decay")]

    def networks(self, images: int, classes: int) -> list[Recipe]:
        """The paper's five networks and the two that it reports as failing, every seed."""
        return [
            self.scaled(each, images, classes, seed=seed, name=f"{name}-seed-{seed}")
            for seed in range(self.seeds)
            for name, each in RECIPES.items()
        ]

    def ablation(self, images: int, classes: int) -> list[Recipe]:
        """BN-x5 without one of its seven changes, for each and for every seed."""
        base = RECIPES["bn-baseline"]
        return [
            self.scaled(
                RECIPES["bn-x5"].replace(**{name: getattr(base, name) for name in names}),
                images,
                classes,
                seed=seed,
                name=f"bn-x5-without-{change}-seed-{seed}",
            )
            for seed in range(self.seeds)
            for change, names in ABLATION.items()
        ]

    def members(self, images: int, classes: int) -> list[Recipe]:
        """The six networks of the ensemble, with the changes that the paper names.

        They are made from BN-x5.  The paper makes its own from BN-x30, its most accurate network,
        which in miniature learns too little.
        """
        rate = RECIPES["bn-x5"].learning_rate
        return [
            self.scaled(
                each.replace(learning_rate=rate),
                images,
                classes,
                name=name.replace("bn-x30", "bn-x5"),
            )
            for name, each in ENSEMBLE.items()
        ]


RECORDINGS: dict[str, Callable[[Miniature, int, int], list[Recipe]]] = {
    "sweep": Miniature.sweep,
    "networks": Miniature.networks,
    "ablation": Miniature.ablation,
    "members": Miniature.members,
}


def prepare(tiny: Path, data: Path, classes: int = 20) -> None:
    """Copy evenly spaced classes of Tiny ImageNet into ``train/<class>/`` and ``val/<class>/``.

    Parameters
    ----------
    tiny
        Tiny ImageNet as it is distributed, or already as an image folder.
    data
        The new folder.
    classes
        How many of its classes, in the order of their names.

    Raises
    ------
    SourceError
        If ``tiny`` is neither, or has fewer classes.
    """
    names = sorted(each.name for each in (tiny / "train").glob("n*") if each.is_dir())
    if len(names) < classes:
        raise SourceError(
            f"{tiny}/train has {len(names)} class folders; {classes} are needed. --tiny must be "
            "the folder that tiny-imagenet-200.zip unpacks to"
        )
    chosen = names[:: len(names) // classes][:classes]
    labels = {}  # of the held-out images, which are distributed in one folder with a list
    listed = tiny / "val" / "val_annotations.txt"
    if listed.is_file():
        rows = (line.split("\t") for line in listed.read_text(encoding="utf-8").splitlines())
        labels = {row[0]: row[1] for row in rows}
    for name in chosen:
        pictures = tiny / "val" / "images"
        held_out = [pictures / file for file, label in labels.items() if label == name]
        parts = {
            "train": sorted((tiny / "train" / name).rglob("*.JPEG")),
            "val": held_out or sorted((tiny / "val" / name).rglob("*.JPEG")),
        }
        for part, files in parts.items():
            if not files:
                raise SourceError(f"{tiny} has no {part} images of class {name}")
            folder = data / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, folder / file.name)


def _record(task: tuple[Recipe, str, Path, Options, Path]) -> str:
    """Train one network, unless that is recorded already."""
    recipe, data, out, options, root = task
    if (root / options.experiment / recipe.name / "manifest.json").is_file():
        return f"{recipe.name}: recorded before"
    torch.set_num_threads(1)
    verdict = train(recipe, data, out / recipe.name, options)
    if not verdict.stopped:
        shutil.copytree(out / recipe.name / "recorded", root, dirs_exist_ok=True)
    return f"{recipe.name}: {verdict}"


def _predict(task: tuple[str, int, Path, str, Options, Path]) -> str:
    """Record what one trained network says of the held-out images, unless that is done already."""
    name, crops, out, data, options, root = task
    recorded = run_name(name, crops)
    if (root / options.experiment / recorded / "manifest.json").is_file():
        return f"{recorded}: recorded before"
    if not (out / name / "network.pt").is_file():
        return f"{recorded}: {out / name} has no network.pt; train it first"
    torch.set_num_threads(1)
    record_probabilities(out / name, data, crops, options.experiment, root, device=options.device)
    return f"{recorded}: finished"


def main() -> None:
    """The command line: ``python -m bnlib.imagenet.miniature --help``."""
    parser = argparse.ArgumentParser(description="Record the runs of chapters 12 and 13.")
    parser.add_argument("what", nargs="+", choices=("prepare", *RECORDINGS, "crops"))
    parser.add_argument("--data", required=True, help="the small data set")
    parser.add_argument("--tiny", type=Path, help="prepare: where Tiny ImageNet is")
    parser.add_argument("--classes", type=int, default=20, help="prepare: how many of its classes")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names begin so")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--root", type=Path, help="folder to record into (default data/runs)")
    fields.add_arguments(parser, Miniature, "how small")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if "prepare" in arguments.what:
        if arguments.tiny is None:
            parser.error("prepare needs --tiny")
        prepare(arguments.tiny, Path(arguments.data), arguments.classes)
    miniature = Miniature(**fields.given(Miniature, arguments))
    source = open_source(arguments.data, "train")
    options = Options(
        device=arguments.device,
        workers=0,
        eval_every=max(1, miniature.steps // 10),
        save_every=max(1, miniature.steps // 3),
        keep=1,
        log_every=max(1, miniature.steps // 20),
        tensorboard=False,
        experiment=miniature.experiment,
    )
    root = arguments.root or runs.data_folder() / "runs"
    sizes = len(source), len(source.classes)
    tasks = [
        (recipe, arguments.data, arguments.out, options, root)
        for what in arguments.what
        if what in RECORDINGS
        for recipe in RECORDINGS[what](miniature, *sizes)
        if recipe.name.startswith(tuple(arguments.only))
    ]
    wanted = [(recipe.name, crops) for crops in CROPS for recipe in miniature.members(*sizes)]
    wanted += [(f"bn-x5-seed-{seed}", 1) for seed in range(miniature.seeds)]  # to compare with
    predictions = [
        (name, crops, arguments.out, arguments.data, options, root)
        for name, crops in wanted
        if "crops" in arguments.what
    ]
    with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(_record, tasks):
            print(line, flush=True)
        for line in pool.imap_unordered(_predict, predictions):
            print(line, flush=True)


if __name__ == "__main__":
    main()
