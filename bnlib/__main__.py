"""The command line: ``python -m bnlib COMMAND --help``."""

from __future__ import annotations

import argparse
import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_NEEDED = (
    "The commands need: pip install pillow scikit-learn tensorboard torchcodec torchvision tqdm"
)
FINISHED, FAILED, USAGE, DIVERGED = 0, 1, 2, 3
EXIT_CODES = """\
exit codes: 0 finished, or stopped by SIGTERM or SIGINT with a checkpoint, from
which the same command goes on; 1 an error; 2 wrong usage; 3 the network
diverged, which is recorded as a result (torchrun makes 1 of it)
"""


def _train(argv: list[str]) -> int:
    from bnlib.imagenet import ENSEMBLE, RECIPES, Recipe, fields, recipe
    from bnlib.imagenet.options import Options

    parser = argparse.ArgumentParser(
        "python -m bnlib train",
        usage="%(prog)s RECIPE --data DIR [--out DIR] [flags; see --help]",
        description="Train one of the paper's networks; the same command resumes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=[*RECIPES, *ENSEMBLE], metavar="RECIPE",
                        help=", ".join([*RECIPES, *ENSEMBLE]))  # fmt: skip
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, ImageNet's "
                        "archives, a packed copy, or hf:NAME")  # fmt: skip
    parser.add_argument("--out", type=Path, help="the run's folder (default runs/RECIPE)")
    fields.add_arguments(parser, Options, "runtime options: they change no number of the result")
    fields.add_arguments(parser, Recipe, "recipe: what is not given stays as the recipe has it")
    arguments = parser.parse_args(argv)
    try:
        chosen = recipe(arguments.recipe).replace(**fields.given(Recipe, arguments))
        options = Options(**fields.given(Options, arguments))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    from bnlib.imagenet.training.loop import train  # here: --help does without tqdm

    out = arguments.out or Path("runs") / chosen.name
    verdict = train(chosen, arguments.data, out, options)
    _say(f"{chosen.name}: {verdict}")
    return DIVERGED if verdict.diverged else FINISHED


def _is_first() -> bool:
    """Whether this is the one that speaks of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_first():
        print(text, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def _evaluate(command: str, argv: list[str]) -> int:
    from bnlib.imagenet.evaluation.crops import CROPS

    several = command == "ensemble"
    parser = argparse.ArgumentParser(
        f"python -m bnlib {command}",
        usage=f"%(prog)s CHECKPOINT {'... ' if several else ''}--data DIR [flags; see --help]",
        description="Accuracy of the arithmetic mean of several networks' probabilities."
        if several
        else "Accuracy of a trained network on held-out images.",
    )
    parser.add_argument("checkpoint", type=Path, nargs="+" if several else 1,
                        help="a run's folder, its network.pt, or step-*.pt")  # fmt: skip
    parser.add_argument("--data", required=True, help="as for training; its val/ part is used")
    parser.add_argument("--crops", type=int, choices=CROPS, default=1, help="views of an image")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--batch", type=_count, default=100, help="views at once")
    parser.add_argument("--record", metavar="NAME", help="write a recorded run of that name")
    parser.add_argument("--record-root", type=Path, default=Path("recorded"), metavar="DIR",
                        help="where --record writes it (default recorded)")  # fmt: skip
    return _evaluate_all(parser.parse_args(argv))


def _evaluate_all(arguments: argparse.Namespace) -> int:
    import torch

    from bnlib.imagenet.data.folders import open_source
    from bnlib.imagenet.evaluation.accuracy import accuracies, load_network
    from bnlib.imagenet.evaluation.inference import predict
    from bnlib.imagenet.evaluation.predictions import ACCURACIES, Evaluated, record_accuracies
    from bnlib.imagenet.processes import processes
    from bnlib.runs import check_name

    # What is wrong is found before hours of work.
    if arguments.record is not None:
        check_name(arguments.record)
        if (there := arguments.record_root / ACCURACIES / arguments.record).exists():
            raise ValueError(f"{there} is there already; give another name, or remove it")
    started, paths = time.time(), arguments.checkpoint
    with processes(arguments.device) as group:
        # the first process before the others, as it may unpack archives
        source = group.after_first(lambda: open_source(arguments.data, "val"))
        networks, recipes = zip(*(load_network(path, source) for path in paths), strict=True)
        for field, message in (
            ("num_classes", "the networks have {} classes; one number is needed"),
            ("image_size", "the networks are for crops of {} pixels; one size is needed"),
        ):
            if len(found := {getattr(recipe, field) for recipe in recipes}) > 1:
                raise ValueError(message.format(sorted(found)))
        predicted = predict(
            [each.to(group.device).to(memory_format=torch.channels_last) for each in networks],
            source,
            recipes[0].image_size,
            arguments.crops,
            group=group,
            workers=arguments.workers,
            batch=arguments.batch,
            progress=group.first,
        )
        *scores, together = accuracies(predicted, len(networks), group)
    rows = []
    for path, recipe, accuracy in zip(paths, recipes, scores, strict=True):
        rows.append(Evaluated(recipe.name, 1, arguments.crops, accuracy))
        _say(f"{path}: {arguments.crops} crops: {accuracy}")
    if len(paths) > 1:
        rows.append(Evaluated("ensemble", len(paths), arguments.crops, together))
        _say(f"ensemble of {len(paths)}: {together}")
    if arguments.record is not None and group.first:
        folder = record_accuracies(
            arguments.record,
            rows,
            recipes=recipes,
            source=source,
            started=started,
            root=arguments.record_root,
        )
        _say(f"recorded in {folder}")
    return FINISHED


def _pack(argv: list[str]) -> int:
    from bnlib.imagenet.data import pack

    return pack.main(argv) or FINISHED


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": functools.partial(_evaluate, "evaluate"),
    "ensemble": functools.partial(_evaluate, "ensemble"),
    "pack": _pack,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are one line, not a trace."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m bnlib {{{','.join(COMMANDS)}}} ...\n\n{EXIT_CODES}", end="")
        return FINISHED if argv else USAGE
    if argv[0] not in COMMANDS:
        print(
            f"unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr
        )
        return USAGE
    level = logging.INFO if _is_first() else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return COMMANDS[argv[0]](argv[1:])
    except ImportError as error:
        print(f"{error}. {_NEEDED}", file=sys.stderr)
    except Exception as error:
        ours = type(error).__module__.startswith("bnlib.")
        killed = str(error).startswith("DataLoader worker")
        if not (ours or killed or isinstance(error, (ValueError, OSError))):
            raise  # a defect: its trace is wanted
        remedy = "Is memory short? Try fewer --workers" if killed else ""
        print(f"{type(error).__name__}: {error}{remedy}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
