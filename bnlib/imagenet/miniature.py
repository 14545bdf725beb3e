"""The command line of the fair trial (:mod:`bnlib.imagenet.trial`): the runs of chapters 12 and 13.

Tiny ImageNet is 200 of ImageNet's classes at 64x64 pixels.  From its folder::

    python -m bnlib.imagenet.miniature prepare --tiny tiny-imagenet-200 --data tiny-imagenet-20
    python -m bnlib.imagenet.miniature search arms --data tiny-imagenet-20
    python -m bnlib.imagenet.miniature edge sigmoid longer ablation members --data tiny-imagenet-20

About ten hours on two cores.  A run that is recorded is not repeated; one that was interrupted goes
on from its checkpoint.  ``members`` also records what each of its networks says about every
held-out image, with 1 and with 144 crops: chapter 13 makes its ensembles of that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from bnlib import runs
from bnlib.imagenet import fields
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import SourceError
from bnlib.imagenet.evaluation.predictions import record_probabilities, run_name
from bnlib.imagenet.options import Options
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.loop import train
from bnlib.imagenet.trial import PARTS, Trial

__all__ = ["main", "prepare"]

#: With how many crops the probabilities of a part's networks are recorded.
_CROPS = {"members": (1, 144)}


def prepare(tiny: Path, data: Path, classes: int = 20, held_out: int = 150) -> None:
    """Copy evenly spaced classes of Tiny ImageNet into ``train/<class>/`` and ``val/<class>/``.

    ``tiny`` is Tiny ImageNet as it is distributed, or already as an image folder; anything else is
    a :class:`~bnlib.imagenet.data.source.SourceError`.  ``held_out`` images of a class are its own
    50 for validation, then the last of its training images.
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
        training = sorted((tiny / "train" / name).rglob("*.JPEG"))
        own = [tiny / "val" / "images" / file for file, label in labels.items() if label == name]
        own = own or sorted((tiny / "val" / name).rglob("*.JPEG"))
        cut = max(0, len(training) - max(0, held_out - len(own)))
        parts = {"train": training[:cut], "val": own + training[cut:] if own else []}
        for part, files in parts.items():
            if not files:
                raise SourceError(f"{tiny} has no {part} images of class {name}")
            folder = data / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, folder / file.name)


def _record(task: tuple[Recipe, Sequence[int], Trial, argparse.Namespace]) -> str:
    """Train one network, and record the run and its probabilities, unless that has been done."""
    recipe, crops, trial, arguments = task
    torch.set_num_threads(1)
    out = arguments.out / trial.experiment / recipe.name

    def is_recorded(name: str) -> bool:
        return (arguments.root / trial.experiment / name / "manifest.json").is_file()

    if is_recorded(recipe.name):
        verdict = runs.read(trial.experiment, recipe.name, root=arguments.root).verdict
        told = "recorded before"
    else:
        verdict = _train(recipe, trial, arguments, out)
        told = str(verdict)
    for count in crops if verdict.finished else ():
        name = run_name(recipe.name, count)
        if is_recorded(name):
            continue
        if not (out / "network.pt").is_file():
            return f"{recipe.name}: {told}; {name} needs {out / 'network.pt'}, which is not there"
        record_probabilities(
            out, arguments.data, count, trial.experiment, arguments.root, device=arguments.device
        )
        told += f", with {count} crops too"
    return f"{recipe.name}: {told}"


def _train(recipe: Recipe, trial: Trial, arguments: argparse.Namespace, out: Path) -> runs.Verdict:
    """Train one network to its end, and record the run."""
    options = Options(
        device=arguments.device,
        workers=0,
        eval_every=0,
        eval_at=" ".join(map(str, trial.evaluated_at(recipe.steps))),
        save_every=1000,
        keep=1,
        log_every=max(1, recipe.steps // 100),
        tensorboard=False,
        experiment=trial.experiment,
    )
    verdict = train(recipe, arguments.data, out, options)
    if not verdict.stopped:
        shutil.copytree(out / "recorded", arguments.root, dirs_exist_ok=True)
    return verdict


@contextlib.contextmanager
def _beside(data: Path) -> Iterator[Path]:
    """Work in the folder that the data lie in, so that manifests hold no path of this machine.

    Gives the data's path from there; the command that manifests hold is the one to be typed there.
    """
    before, path = sys.orig_argv, data.absolute()
    sys.orig_argv = [before[0], *map(_last_part, before[1:])]
    try:
        with contextlib.chdir(path.parent):
            yield Path(path.name)
    finally:
        sys.orig_argv = before


def _last_part(word: str) -> str:
    """An argument; if it is an absolute path or sets an option to one, the path's last part."""
    option, equals, value = word.rpartition("=")
    return option + equals + Path(value).name if Path(value).is_absolute() else word


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``python -m bnlib.imagenet.miniature --help``."""
    parser = argparse.ArgumentParser(description="Record the runs of chapters 12 and 13.")
    parser.add_argument("what", nargs="+", choices=("prepare", "search", *PARTS))
    parser.add_argument("--data", type=Path, required=True, help="the small data set")
    parser.add_argument("--tiny", type=Path, help="prepare: where Tiny ImageNet is")
    parser.add_argument("--classes", type=int, default=20, help="prepare: how many of its classes")
    parser.add_argument("--held-out", type=int, default=150, help="prepare: images of a class")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--root", type=Path, help="folder to record into (default data/runs)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names begin so")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    fields.add_arguments(parser, Trial, "how small")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if "prepare" in arguments.what:
        if arguments.tiny is None:
            parser.error("prepare needs --tiny")
        prepare(arguments.tiny, arguments.data, arguments.classes, arguments.held_out)
    trial = Trial(**fields.given(Trial, arguments))
    arguments.root = arguments.root or runs.data_folder() / "runs"
    arguments.root, arguments.out = arguments.root.resolve(), arguments.out.resolve()
    source = open_source(arguments.data, "train")
    sizes = len(source), len(source.classes), arguments.root

    def record(recipes: Iterable[Recipe], crops: Sequence[int] = ()) -> bool:
        chosen = [each for each in recipes if each.name.startswith(tuple(arguments.only))]
        for line in record_all([(recipe, crops, trial, arguments) for recipe in chosen]):
            print(line, flush=True)
        return bool(chosen)

    with contextlib.ExitStack() as stack:
        arguments.data = stack.enter_context(_beside(arguments.data))
        record_all: Callable[..., Iterable[str]] = functools.partial(map, _record)
        if arguments.jobs > 1:  # forked, before torch has threads: a manifest holds this command
            context = multiprocessing.get_context("fork")
            pool = stack.enter_context(context.Pool(arguments.jobs, maxtasksperchild=1))
            record_all = functools.partial(pool.imap_unordered, _record)
        for what in arguments.what:
            if what == "search":
                while record(trial.search(*sizes)):
                    pass
            elif what in PARTS:
                record(PARTS[what](trial, *sizes), _CROPS.get(what, ()))


if __name__ == "__main__":
    main()
