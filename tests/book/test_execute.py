"""The pipeline from chapter to executed notebook: failures are loud, nothing is stale.

Each test works on a small project in a temporary folder: the real Makefile and executor, two tiny
chapters and a ledger chapter, and a bnlib of a few empty modules.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from bnlib.book import depends
from bnlib.book.execute import ChapterError, check, execute, parse_parameters

ROOT = Path(__file__).parents[2]
EXECUTED = Path("_build/book/chapters")
ALL = {"04_uses_alpha", "05_reads_data", "16_claims"}


def chapter(project, name, *cells):
    """Write a chapter whose parameters are ``steps`` and ``rate``."""
    parameters = nbformat.v4.new_code_cell("steps = 5  # how many\nrate = 0.1\nlabel = ''")
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(f"# {name}"),
            parameters,
            *map(nbformat.v4.new_code_cell, cells),
        ]
    )
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    path = project / "chapters" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def project(tmp_path):
    for folder in ("chapters", "data/paper", "bnlib/book", "_static", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    # The environment that runs these tests, except that nothing can be installed into it.
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in pip | uv) exit 0 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("execute.py", "depends.py"):
        shutil.copy(ROOT / "bnlib" / "book" / name, tmp_path / "bnlib" / "book")
    for name in "requirements.lock pyproject.toml _config.yml _toc.yml references.bib".split():
        (tmp_path / name).touch()
    (tmp_path / "data" / "paper" / "claims.csv").touch()
    (tmp_path / "bnlib" / "__init__.py").write_text("from bnlib.gamma import other\n")
    (tmp_path / "bnlib" / "book" / "__init__.py").touch()
    (tmp_path / "bnlib" / "alpha.py").write_text("from bnlib import beta\n")
    (tmp_path / "bnlib" / "beta.py").write_text("value = 1\n")
    (tmp_path / "bnlib" / "gamma.py").write_text("other = 1\n")
    (tmp_path / "bnlib" / "runs.py").touch()
    chapter(tmp_path, "04_uses_alpha", "import bnlib.alpha")
    chapter(tmp_path, "05_reads_data", "from bnlib import runs")
    chapter(tmp_path, "16_claims", "1")
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def start(project, *arguments):
    """Start make in the project, without what an outer make has put into the environment."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    return subprocess.Popen(
        ["make", "JOBS=2", *arguments],
        cwd=project,
        env={name: value for name, value in os.environ.items() if name not in outer},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore the interrupt key.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def make(project, *arguments):
    """Run make in the project; return its exit status and all that it printed."""
    process = start(project, *arguments)
    printed, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def planned(project):
    """The chapters that the next `make book` would execute."""
    plan = make(project, "--dry-run", "chapters")
    assert plan.returncode == 0, plan.stdout
    return set(re.findall(r"-m bnlib\.book\.execute chapters/(\w+)\.ipynb", plan.stdout))


def settle(project):
    """Date the sources before what was made of them, and both before now."""
    now = time.time()
    for path in project.rglob("*"):
        if not path.is_symlink():
            age = 100 if "_build" in path.parts else 200
            os.utime(path, (now - age, now - age))


def test_only_what_is_out_of_date_is_executed_again(project):
    assert planned(project) == ALL
    done = make(project, "--jobs=2", "chapters")
    assert done.returncode == 0, done.stdout
    for name in ALL:
        assert re.search(rf"^{name} +cell 3 of 3, \d\d:\d\d$", done.stdout, re.M)
        assert re.search(rf"^{name} +done in [\d.]+ s$", done.stdout, re.M)
        executed = nbformat.read(project / EXECUTED / f"{name}.ipynb", as_version=4)
        assert [c.execution_count for c in executed.cells if c.cell_type == "code"] == [1, 2]
    assert planned(project) == set()

    settle(project)
    # The ledger depends on every other chapter; a chapter on what its imports reach.
    touched = {
        "chapters/04_uses_alpha.ipynb": {"04_uses_alpha", "16_claims"},
        "chapters/16_claims.ipynb": {"16_claims"},
        "bnlib/alpha.py": {"04_uses_alpha", "16_claims"},
        "bnlib/beta.py": {"04_uses_alpha", "16_claims"},
        "bnlib/gamma.py": set(),
        "data/paper/claims.csv": {"05_reads_data", "16_claims"},
        "requirements.lock": ALL,
    }
    for name, expected in touched.items():
        path = project / name
        before = path.stat()
        path.touch()
        assert planned(project) == expected, name
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert planned(project) == set()


def test_a_second_make_book_plans_nothing(project):
    for name in ALL:
        output = project / EXECUTED / f"{name}.ipynb"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    rendered = project / "_build" / "html" / ".rendered"
    rendered.parent.mkdir()
    rendered.touch()
    settle(project)
    plan = make(project, "--dry-run", "book")
    assert plan.returncode == 0, plan.stdout
    assert "bnlib.book.execute" not in plan.stdout
    assert "jupyter-book" not in plan.stdout
    (project / "_config.yml").touch()
    assert "jupyter-book" in make(project, "--dry-run", "book").stdout


def test_a_module_may_be_deleted_when_nothing_uses_it_any_more(project):
    assert planned(project) == ALL
    chapter(project, "04_uses_alpha", "1 + 1")
    (project / "bnlib" / "alpha.py").unlink()
    assert planned(project) == ALL


def test_a_failing_cell_fails_the_book_with_chapter_cell_and_message(project):
    chapter(project, "04_uses_alpha", "\n\nx = [2 * steps][7]\nprint(x)")
    book = make(project, "book")
    assert book.returncode != 0
    assert "04_uses_alpha: cell 2 failed: x = [2 * steps][7]\n" in book.stdout
    assert "IndexError: list index out of range" in book.stdout
    assert "jupyter-book" not in book.stdout

    # The others ran all the same; what came of this one is kept, but not as its output.
    names = {path.name for path in (project / EXECUTED).iterdir()}
    assert names == {"05_reads_data.ipynb", "partial-04_uses_alpha.ipynb"}
    assert "partial-04_uses_alpha.ipynb" in book.stdout
    assert planned(project) == {"04_uses_alpha", "16_claims"}


@pytest.mark.parametrize("failures", [1, 3])
def test_a_kernel_that_does_not_come_up_is_started_again(tmp_path, monkeypatch, failures):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    kernel = f"""
import os, sys
with open({str(tmp_path / "starts")!r}, "a+") as starts:
    starts.write("x")
    starts.seek(0)
    if len(starts.read()) <= {failures}:
        sys.exit("Address already in use")
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])
"""
    argv = [sys.executable, "-c", kernel, "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (tmp_path / "chapters").mkdir()
    source, done = chapter(tmp_path, "04_uses_alpha", "1 + 1"), tmp_path / "done.ipynb"
    if failures == 1:
        execute(source, done)
        assert nbformat.read(done, as_version=4).cells[-1].outputs[0].data["text/plain"] == "2"
    else:
        with pytest.raises(RuntimeError, match="Kernel died"):
            execute(source, done)
    assert (tmp_path / "starts").read_text() == "x" * (2 if failures == 1 else 3)


def test_a_chapter_that_is_not_python_fails_as_plainly(project):
    chapter(project, "04_uses_alpha", "this isn't Python")
    book = make(project, "chapters")
    assert book.returncode != 0
    assert "04_uses_alpha: cell 2 failed: this isn't Python\n  SyntaxError" in book.stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_leaves_nothing_that_make_takes_for_done(project, number):
    began = project / "began"
    chapter(
        project,
        "04_uses_alpha",
        f"open({str(began)!r}, 'w').close()",
        "import time",
        "time.sleep(99)",
    )
    process = start(project, "chapters")
    try:
        deadline = time.monotonic() + 120
        while not began.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert began.exists()
    finally:
        os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (project / EXECUTED / "04_uses_alpha.ipynb").exists()
    assert "04_uses_alpha" in planned(project)


def test_run_passes_parameters_as_papermill_reads_them(project):
    cell = "assert (steps, rate, label) == (2000, 1e-3, 'two words'), (steps, rate, label)"
    chapter(project, "04_uses_alpha", cell)
    done = make(project, "run", "CHAPTER=04_uses_alpha", "P=steps=2000 rate=1e-3 label='two words'")
    assert done.returncode == 0, done.stdout
    executed = nbformat.read(project / "_build/run/04_uses_alpha.ipynb", as_version=4)
    assert executed.metadata.papermill.parameters == {
        "steps": 2000,
        "rate": 1e-3,
        "label": "two words",
    }
    assert not (project / EXECUTED).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["CHAPTER=04_uses_alpha", "P=stepz=1"],
            "04_uses_alpha has no parameter 'stepz'; it has: steps=5, rate=0.1, label=''",
        ),
        (
            ["CHAPTER=04_mnist"],
            "there is no chapter '04_mnist' in chapters/; "
            "known: 04_uses_alpha, 05_reads_data, 16_claims",
        ),
        ([], "there is no chapter ''"),
        (["CHAPTER=04_uses_alpha", "P=steps"], "'steps' is not an assignment"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(project, arguments, message):
    refused = make(project, "run", *arguments)
    assert refused.returncode != 0
    assert message in refused.stdout
    assert "Traceback" not in refused.stdout
    assert not (project / "_build" / "run").exists()


def test_parameters_are_yaml_and_numbers_are_numbers():
    text = "n=3 rate=1e-3 on=true none=null list='[1, 2]' text=digits empty= date='a b' path=x=y"
    assert parse_parameters(text) == {
        "n": 3,
        "rate": 1e-3,
        "on": True,
        "none": None,
        "list": [1, 2],
        "text": "digits",
        "empty": None,
        "date": "a b",
        "path": "x=y",
    }
    assert parse_parameters("") == {}


@pytest.mark.parametrize("text", ["steps 3", "=3", "my-step=3", "a='b"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(ChapterError, match=r"assignment|quotation"):
        parse_parameters(text)


def test_the_books_own_chapters_accept_their_own_parameters():
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        check(path)
        with pytest.raises(ChapterError, match="has no parameter 'no_such'"):
            check(path, ["no_such"])


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import numpy", set()),
        ("import bnlib.beta", {"bnlib", "bnlib.beta"}),
        ("from bnlib import alpha", {"bnlib", "bnlib.alpha", "bnlib.beta"}),
        ("from bnlib import other", {"bnlib", "bnlib.gamma"}),
        ("import bnlib", {"bnlib", "bnlib.gamma"}),
        ("def f():\n    from bnlib.alpha import beta", {"bnlib", "bnlib.alpha", "bnlib.beta"}),
        ("from bnlib.book import execute", {"bnlib", "bnlib.book", "bnlib.book.execute"}),
        ("from bnlib import missing", {"bnlib", "bnlib.gamma"}),
    ],
)
def test_imports_are_followed_to_the_modules_they_reach(project, source, modules):
    assert set(depends.modules_used(source, project)) == modules


def test_chapters_depend_on_the_rooms_of_bnlib_that_they_use_and_on_no_other():
    def used(name):
        code = depends.code_of(ROOT / "chapters" / f"{name}.ipynb")
        return {
            path.relative_to(ROOT).as_posix() for path in depends.modules_used(code, ROOT).values()
        }

    stacks = "bnlib/mnist/stacks.py"
    in_a_network, transform = used("07_bn_in_a_network"), used("04_bn_transform")
    assert {stacks, "bnlib/mnist/digits.py", "bnlib/observe/recorder.py"} <= in_a_network
    assert "bnlib/mnist/digits.py" in transform
    assert stacks not in transform, "chapter 04 reads digits and trains nothing"
    # Through `from bnlib.mnist import both` and the experiment, which calls the stacks.
    assert {stacks, "bnlib/population.py", "bnlib/runs.py"} <= used("10_mnist")
    for chapter in (in_a_network, transform):
        assert not {path for path in chapter if path.startswith("bnlib/imagenet/")}


def test_relative_imports_are_followed_too(project):
    (project / "bnlib" / "alpha.py").write_text("from . import beta\nfrom .gamma import other\n")
    used = depends.modules_used("import bnlib.alpha", project)
    assert set(used) == {"bnlib", "bnlib.alpha", "bnlib.beta", "bnlib.gamma"}
