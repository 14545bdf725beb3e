"""Execute a chapter with papermill.

::

    python -m bnlib.book.execute chapters/10_mnist.ipynb out.ipynb --parameters "steps=2000 seed=1"

Plain ``papermill`` runs the same chapters. Here a misspelt parameter is an error, the output
appears under its name only when every cell has run, progress reads well where several chapters
share a log, and a failure names the chapter, the cell and the message.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import yaml
from papermill import PapermillExecutionError, execute_notebook, inspect_notebook

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ATTEMPTS = 3


class ChapterError(RuntimeError):
    """A chapter cannot be executed, or failed; the message says which, where and why."""


def parse_parameters(text: str) -> dict[str, Any]:
    """Read ``"steps=2000 dataset=digits"``, quoted as in a shell, with values as in YAML.

    ``1e-3``, which YAML 1.1 takes for text, is a number here, as it is for ``papermill -p``. A
    ChapterError refuses a word that is no assignment, and a quotation that does not end.
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
            with suppress(ValueError):
                parameters[name] = float(value)
    return parameters


def check(chapter: Path, parameters: Iterable[str] = ()) -> None:
    """Raise a ChapterError if a chapter or a parameter does not exist, naming those that do."""
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


def execute(chapter: Path, output: Path, parameters: dict[str, Any] | None = None) -> None:
    """Execute a chapter in the kernel ``python3``; ``output`` appears when every cell has run.

    Until then, and after a failure, it stands beside its name as ``partial-<name>``. ``parameters``
    are values for names that the chapter's cell tagged ``parameters`` assigns.

    Raises
    ------
    ChapterError
        For an unknown chapter or parameter, and for a cell that fails: with the chapter, the
        cell's number and first line, and the message.
    """
    check(chapter, parameters or ())
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"partial-{output.name}")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    started = time.monotonic()
    try:
        _execute_with_a_free_port(
            chapter,
            partial,
            parameters,
            kernel_name="python3",
            # A line of its own for each report, as parallel chapters share the terminal or log.
            progress_bar={
                "bar_format": f"{chapter.stem:<24} cell {{n_fmt}} of {{total_fmt}}, {{elapsed}}\n",
                "mininterval": 2.0,
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


def _execute_with_a_free_port(*arguments: Any, **options: Any) -> None:
    """papermill's ``execute_notebook``, again if the kernel does not come up.

    A kernel opens its ports some time after they were seen to be free.  Now and then one that
    starts at the same moment takes the same.
    """
    for attempt in range(_ATTEMPTS):
        try:
            execute_notebook(*arguments, **options)
        except RuntimeError as error:
            if attempt + 1 == _ATTEMPTS or "before replying" not in str(error):
                raise
        else:
            return


def main() -> None:
    """Run the command line; exit with 1 if the chapter cannot be executed, or fails."""
    parser = argparse.ArgumentParser(prog="python -m bnlib.book.execute", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chapter", type=Path, help="the notebook's source")
    parser.add_argument("output", type=Path, help="where the executed notebook goes")
    parser.add_argument(
        "--parameters", default="", metavar="'NAME=VALUE ...'", help="values are read as YAML"
    )
    options = parser.parse_args()
    try:
        execute(options.chapter, options.output, parse_parameters(options.parameters))
    except ChapterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
