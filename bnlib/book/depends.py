"""What each chapter depends on, as rules for make (as ``gcc -M`` does for C).

::

    python -m bnlib.book.depends _build/book/chapters chapters/*.ipynb > _build/depends.mk

An executed chapter is out of date when its source changes, or any module of bnlib that its code
reaches by imports, directly or through one another. Jupyter Book's own cache cannot know that.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

_PACKAGE = "bnlib"
#: What reaches this module may read the ``data`` folder: make's variable ``DATA`` lists it.
_READER = "bnlib.runs"


def _imports(source: str, package: str = "") -> Iterator[tuple[str, str]]:
    """The (module, name) pairs that ``source`` imports; no name for ``import module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = importlib.util.resolve_name("." * node.level + module, package)
            yield from ((module, alias.name) for alias in node.names)


def _file(module: str, root: Path) -> Path | None:
    base = root.joinpath(*module.split("."))
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def modules_used(source: str, root: Path) -> dict[str, Path]:
    """The files of the modules that ``source`` reaches, directly or through one another, by name.

    ``from bnlib import batch_norm`` reaches the module from which the package takes that name,
    not the others that the package offers. ``root`` is the folder that holds the package.
    """
    used: dict[str, Path] = {}
    followed: set[tuple[str, str]] = set()
    waiting = list(_imports(source))
    while waiting:
        module, name = waiting.pop()
        if name and _file(f"{module}.{name}", root):
            module, name = f"{module}.{name}", ""
        file = _file(module, root)
        if module.split(".")[0] != _PACKAGE or file is None or (module, name) in followed:
            continue
        followed.add((module, name))
        for above in accumulate(module.split("."), "{}.{}".format):
            if path := _file(above, root):
                used[above] = path
        is_package = file.name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        found = list(_imports(file.read_text(encoding="utf-8"), package))
        if is_package and name:
            found = [pair for pair in found if pair[1] == name] or found
        waiting += found
    return used


def code_of(chapter: Path) -> str:
    """The chapter's code cells as one Python text, notebook magics made calls."""
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    transform = TransformerManager().transform_cell
    return "\n".join(transform("".join(c["source"])) for c in cells if c["cell_type"] == "code")


def rules(executed: Path, chapters: Sequence[Path], root: Path) -> Iterator[str]:
    """Lines of a makefile: what each chapter in the folder ``executed`` depends on.

    Besides its own source, that is; the paths in the rules are relative to ``root``, the folder
    that holds the package.
    """
    everything: set[str] = set()
    for chapter in chapters:
        try:
            used = modules_used(code_of(chapter), root)
        except SyntaxError as error:
            # Executing the chapter says so better; until then it depends on its source alone.
            yield f"# {chapter}: {error}".replace("\n", " ")
            continue
        files = sorted(path.relative_to(root).as_posix() for path in used.values())
        everything.update(files)
        data = ["$(DATA)"] if _READER in used else []
        yield f"{executed / chapter.name}: {' '.join([*files, *data])}"
    # A rule without a recipe lets make carry on when a module has been deleted or renamed.
    yield from (f"{file}:" for file in sorted(everything))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bnlib.book.depends", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("executed", type=Path, help="the folder of executed chapters")
    parser.add_argument("chapters", type=Path, nargs="*", help="their sources")
    options = parser.parse_args()
    print("\n".join(rules(options.executed, options.chapters, Path.cwd())))


if __name__ == "__main__":
    main()
