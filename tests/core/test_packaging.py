"""What is distributed: a wheel that runs a chapter alone, and a source archive that tests."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from bnlib.__main__ import _NEEDED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, cwd, **environment):
    answer = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=CLEAN | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation")
    run(*build, "--python", sys.executable, "--out-dir", folder, ROOT, cwd=folder)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A Python with the wheel and the packages that it needs, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps")
    run(*install, "--python", python, built[1], cwd=folder)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(python, "-c", purelib, cwd=folder).strip())
    (own / "needed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python


def test_every_package_is_named():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        [*find_packages(str(ROOT), include=["bnlib*"]), "bnlib.data"]
    )


def test_the_wheel_holds_the_module_and_what_the_chapters_read_and_no_test(built):
    names = zipfile.ZipFile(built[1]).namelist()
    for name in ("bnlib/py.typed", "bnlib/data/paper/claims.csv"):
        assert name in names
    runs = [path.relative_to(ROOT) for path in (ROOT / "data" / "runs").rglob("*.json")]
    assert runs
    assert {f"bnlib/{path.as_posix()}" for path in runs} <= set(names)
    assert not [name for name in names if "test" in name or name.endswith(".ipynb")]


def test_a_chapter_runs_alone_with_the_wheel(installed, tmp_path):
    where = run(installed, "-c", "import bnlib; print(bnlib.__file__)", cwd=tmp_path)
    assert not Path(where.strip()).is_relative_to(ROOT)
    notebook = ROOT / "chapters" / "05_bn_derivative.ipynb"
    run(installed, "-m", "papermill", "--no-progress-bar", notebook, "out.ipynb", cwd=tmp_path)
    assert "bn-claim" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_the_tests_pass_from_the_unpacked_source_archive(built, tmp_path):
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    some = ("tests/core/test_functional.py", "tests/core/test_runs.py", "tests/book/test_claims.py")
    said = run(*pytest_, *some, cwd=root, PYTHONPATH=str(root))
    assert "passed" in said
    for name in ("Makefile", "requirements.lock", "_config.yml", "chapters/index.md"):
        assert (root / name).is_file()


def test_the_message_on_missing_packages_names_those_of_the_extra():
    extra = PROJECT["project"]["optional-dependencies"]["train"]
    needed = [each.split(">")[0] for each in extra]
    assert _NEEDED.endswith("pip install " + " ".join(needed))
