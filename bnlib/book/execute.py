"""Execute a chapter with papermill.

::

    python -m bnlib.book.execute chapters/10_mnist.ipynb out.ipynb --parameters "steps=2000 seed=1"

Plain ``papermill`` runs the same chapters. This adds what it lacks: a misspelt parameter is an
error, the output appears under its name only when every cell has run, progress reads well where
several chapters share a log, and a failure names the chapter, the cell and the message.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from papermill import PapermillExecutionError, execute_notebook, inspect_notebook

_QUIET_SECONDS = 2.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ChapterError(RuntimeError):
    """A chapter cannot be executed, or failed; the message says which, where and why."""


def parse_parameters(text: str) -> dict[str, Any]:
    """Read ``"steps=2000 dataset=digits"``, quoted as in a shell, with values as in YAML.

    Parameters
    ----------
    text
        Assignments separated by white space. ``1e-3``, which YAML 1.1 takes for text, is a number
        here, as it is for ``papermill -p``.

    Raises
    ------
    ChapterError
        For a word that is no assignment, or a quotation that does not end.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ChapterError(f"parameters {text!r}: {error}") from error
    parameters = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ChapterError(
                f"{word!r} is not an assignment; write parameters as 'steps=2000 seed=1'"
            )
        parameters[name] = yaml.safe_load(value)
        if isinstance(parameters[name], str):
            try:
                parameters[name] = float(value)
            except ValueError:
                continue
    return parameters


def check(chapter: Path, parameters: Iterable[str] = ()) -> None:
    """Refuse a chapter or a parameter that does not exist, naming those that do.

    Raises
    ------
    ChapterError
        For an unknown chapter or parameter.
    """
    if not chapter.is_file():
        known = ", ".join(sorted(path.stem for path in chapter.parent.glob("*.ipynb")))
        name = chapter.name.removesuffix(".ipynb")
        raise ChapterError(
            f"there is no chapter {name!r} in {chapter.parent}/; known: {known or 'none'}"
        )
    known_parameters = inspect_notebook(chapter)
    for name in parameters:
        if name not in known_parameters:
            defaults = ", ".join(f"{p['name']}={p['default']}" for p in known_parameters.values())
            raise ChapterError(
                f"{chapter.stem} has no parameter {name!r}; it has: {defaults or 'none'}"
            )


def _say(chapter: str, text: str) -> None:
    # One write a line, so that the lines of parallel chapters do not mix.
    sys.stderr.write(f"{chapter:<24} {text}\n")
    sys.stderr.flush()


def partial_name(output: Path) -> Path:
    """Where an execution of ``output`` stands until it is complete, and stays if it fails."""
    return output.with_name(f"partial-{output.name}")


def execute(chapter: Path, output: Path, parameters: dict[str, Any] | None = None) -> None:
    """Execute a chapter in the kernel ``python3``; ``output`` appears when every cell has run.

    Parameters
    ----------
    chapter
        The notebook's source.
    output
        Where the executed notebook goes; its folder is made. Until then, and after a failure,
        it stands under :func:`partial_name`.
    parameters
        Values for names that the chapter's cell tagged ``parameters`` assigns.

    Raises
    ------
    ChapterError
        For an unknown chapter or parameter, and for a cell that fails: with the chapter, the
        cell's number and first line, and the message.
    """
    check(chapter, parameters or ())
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(output)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    started = time.monotonic()
    try:
        execute_notebook(
            chapter,
            partial,
            parameters,
            kernel_name="python3",
            # A line of its own for each report, as parallel chapters share the terminal or log.
            progress_bar={
                "bar_format": f"{chapter.stem:<24} cell {{n_fmt}} of {{total_fmt}}, {{elapsed}}\n",
                "mininterval": _QUIET_SECONDS,
                "miniters": 1,
            },
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except PapermillExecutionError as error:
        for line in _ANSI.sub("", "\n".join(error.traceback)).splitlines():
            _say(chapter.stem, f"| {line}")
        code = [c for c in nbformat.read(partial, as_version=4).cells if c.cell_type == "code"]
        number = 1 + [bool(cell.metadata.papermill.exception) for cell in code].index(True)
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        raise ChapterError(
            f"{chapter.stem}: cell {number} failed: {first}\n"
            f"  {error.ename}: {error.evalue}\n"
            f"  the notebook as far as it came: {partial}"
        ) from error
    os.replace(partial, output)
    _say(chapter.stem, f"done in {time.monotonic() - started:.1f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bnlib.book.execute", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chapter", type=Path, help="the notebook's source")
    parser.add_argument("output", type=Path, help="where the executed notebook goes")
    parser.add_argument(
        "--parameters", default="", metavar="'NAME=VALUE ...'", help="values are read as YAML"
    )
    options = parser.parse_args(arguments)
    try:
        execute(options.chapter, options.output, parse_parameters(options.parameters))
    except ChapterError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
