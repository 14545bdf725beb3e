"""The order of the rooms: imports go downward only, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_FILES = 12  # .py files in a folder
MOST_LINES = 80  # in the body of a function, its docstring not counted

# Every room, from the lowest to the highest, and the rooms below it that it may import.
CORE = "_core functional modules folding population"
IMAGENET = f"{CORE} runs inception imagenet.fields imagenet.recipes imagenet.options"
TRAINED = f"{IMAGENET} imagenet imagenet.checkpoint imagenet.processes imagenet.data"
MAY_IMPORT = {
    "_core": "",
    "functional": "_core",
    "modules": "_core functional",
    "folding": "_core modules",
    "population": "_core modules folding",
    "whitening": "_core functional",
    "detached": "_core functional whitening",
    "runs": "",
    "observe": f"{CORE} runs",
    "inception": "modules",
    "mnist": f"{CORE} runs observe",
    "imagenet.fields": "",
    "imagenet.recipes": "runs inception imagenet.fields",
    "imagenet.options": "runs imagenet.fields",
    "imagenet": "imagenet.recipes",
    "imagenet.checkpoint": IMAGENET,
    "imagenet.processes": IMAGENET,
    "imagenet.data": f"{IMAGENET} imagenet imagenet.checkpoint imagenet.processes",
    "imagenet.evaluation": TRAINED,
    "imagenet.training": f"{TRAINED} imagenet.evaluation",
    "imagenet.replicas": f"{TRAINED} imagenet.evaluation imagenet.training",
    "imagenet.trial": IMAGENET,
    "imagenet.miniature": f"{TRAINED} imagenet.evaluation imagenet.training imagenet.trial",
    "book": "runs",
    "": f"{CORE} inception",
    "__main__": f"{TRAINED} imagenet.evaluation imagenet.training book",
}


def room_of(module: str) -> str | None:
    """The room of ``bnlib.a.b``: the longest name in the table that it lies in."""
    name = module.removeprefix("bnlib").removeprefix(".")
    while name and name not in MAY_IMPORT:
        name = name.rpartition(".")[0]
    alone = ("", "imagenet")  # the rooms' names hold these files only, not what lies below them
    own = "bnlib." + name if name else "bnlib"
    return None if name in alone and module != own else name


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package in that folder, by name."""
    found = {}
    for path in sorted((root / "bnlib").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and name of every module of ours that a file imports, wherever in it that stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(base) for name in inside]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.partition(".")[0] == "bnlib":
                yield node.lineno, name


def upward_imports(root: Path) -> Iterator[str]:
    """Imports that the table does not allow, and modules that stand in no room."""
    known = modules(root)
    for module, path in known.items():
        here, file = room_of(module), path.relative_to(root)
        if here is None:
            yield f"{file}:1: {module} stands in no room of the table"
            continue
        for line, name in imports(module, path, known):
            there = room_of(name)
            if there != here and (there is None or there not in MAY_IMPORT[here].split()):
                allowed = MAY_IMPORT[here] or "nothing of bnlib"
                yield f"{file}:{line}: imports {name}; {here or 'bnlib'} may import {allowed}"


def circles(root: Path) -> Iterator[str]:
    """Modules from which imports lead back to themselves."""
    known = modules(root)
    graph = {m: {n for _, n in imports(m, p, known)} & set(known) for m, p in known.items()}
    for start in graph:
        seen, ahead = set(), list(graph[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += graph[module]
        if start in seen:
            yield f"{known[start].relative_to(root)}:1: its imports lead back to {start}"


def full_folders(root: Path) -> Iterator[str]:
    """Folders with too many files."""
    files = [*(root / "bnlib").rglob("*.py"), *(root / "tests").rglob("*.py")]
    for folder in sorted({path.parent for path in files}):
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES:
            yield f"{folder.relative_to(root)}: {count} files, and {MOST_FILES} is the most"


def long_functions(root: Path) -> Iterator[str]:
    """Functions that do not fit a page."""
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[ast.get_docstring(node) is not None :] or node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            if lines > MOST_LINES:
                where = f"{path.relative_to(root)}:{node.lineno}"
                yield f"{where}: {node.name} has {lines} lines, and {MOST_LINES} is the most"


RULES = (upward_imports, circles, full_folders, long_functions)
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@each_rule
def test_the_package_keeps_to_the_rules(rule: Callable[[Path], Iterator[str]]) -> None:
    assert "\n".join(rule(ROOT)) == ""


def test_the_table_names_what_there_is_and_leads_downward() -> None:
    assert set(MAY_IMPORT) == {room_of(module) for module in modules(ROOT)}
    rooms = list(MAY_IMPORT)
    for place, (room, allowed) in enumerate(MAY_IMPORT.items()):
        assert set(allowed.split()) <= set(rooms[:place]), room


LONG = "def f():\n    '''One line.'''\n" + "    x = 1\n" * (MOST_LINES + 1)


@pytest.mark.parametrize(
    ("file", "source", "rule", "message"),
    [
        (
            "modules.py",
            "from bnlib.population import x",
            upward_imports,
            "modules.py:1: imports bn",
        ),
        (
            "modules.py",
            "\ndef f():\n    import bnlib.runs",
            upward_imports,
            "modules.py:3: imports",
        ),
        ("modules.py", "from . import whitening", upward_imports, "imports bnlib.whitening"),
        ("inception/a.py", "from ..observe.b import x", upward_imports, "imports bnlib.observe.b"),
        ("inception/a.py", "from bnlib import batch_norm", upward_imports, "imports bnlib; inc"),
        ("imagenet/data/a.py", "from bnlib.imagenet.training import x", upward_imports, "training"),
        ("_core/a.py", "import bnlib.functional", upward_imports, "_core may import nothing of"),
        ("novel.py", "", upward_imports, "bnlib.novel stands in no room"),
        ("imagenet/novel.py", "", upward_imports, "bnlib.imagenet.novel stands in no room"),
        (
            "observe/b.py",
            "def f():\n    from bnlib.observe import c",
            circles,
            "b.py:1: its imports",
        ),
        ("observe/d12.py", "", full_folders, "observe: 13 files, and 12 is the most"),
        ("runs.py", LONG, long_functions, "runs.py:1: f has 81 lines, and 80 is the most"),
    ],
)
def test_a_violation_is_found_and_named(
    file: str, source: str, rule: Callable[[Path], Iterator[str]], message: str, tmp_path: Path
) -> None:
    for number in range(10):
        path = tmp_path / "bnlib" / "observe" / f"d{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sound = {
        "modules.py": "from bnlib.functional import x\n",
        "functional.py": "import torch\n",
        "whitening.py": "",
        "observe/b.py": "from ..modules import x\n",
        "observe/c.py": "from bnlib.observe import b\n",
        "runs.py": LONG.replace("    x = 1\n", "", 1),
    }
    for name, text in sound.items():
        (tmp_path / "bnlib" / name).write_text(text)
    assert [violation for each in RULES for violation in each(tmp_path)] == []
    broken = tmp_path / "bnlib" / file
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text(source)
    found = list(rule(tmp_path))
    assert found
    assert message in found[0]


IMPORTED = """
import builtins, sys
found, original = set(), builtins.__import__

def record(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and str((globals or {}).get("__name__")).partition(".")[0] == "bnlib":
        found.add(name.partition(".")[0])
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = record
import bnlib
print(*(found - sys.stdlib_module_names))
"""


def test_importing_bnlib_takes_torch_and_numpy_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"bnlib", "torch"} <= set(done.stdout.split()) <= {"bnlib", "torch", "numpy"}
