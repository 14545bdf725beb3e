"""The chapters as they are committed, and the pages around them."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

import bnlib
from bnlib.book.claims import read_claims
from bnlib.book.depends import code_of

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def claims_called(path):
    """The ids that a chapter hands to ``claim``, written out there or in a table before it."""
    nodes = list(ast.walk(ast.parse(code_of(path))))
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "claim"]
    for call in calls:
        assert isinstance(call.args[0], ast.Constant | ast.Name), f"{path.name}: write the id out"
        if isinstance(call.args[0], ast.Constant):
            yield call.args[0].value
    if any(isinstance(call.args[0], ast.Name) for call in calls):
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        yield from texts & set(read_claims())


def test_there_are_chapters():
    assert CHAPTERS


@each_chapter
def test_a_chapter_is_committed_without_outputs_and_with_the_plain_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "paper"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each_chapter
def test_a_chapter_begins_with_its_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]
    assert papermill.inspect_notebook(str(path))


@each_chapter
def test_every_figure_has_a_caption_a_name_and_a_description(path):
    for cell in nbformat.read(path, as_version=4).cells:
        page = cell.metadata.get("mystnb", {})
        if "figure" in page or "image" in page:
            assert page["figure"]["caption"].rstrip().endswith((".", ")")), cell.id
            assert re.match(r"fig-(\d\d|train)-", page["figure"]["name"]), cell.id
            assert len(page["image"]["alt"]) > 20, cell.id


@each_chapter
def test_every_fold_says_what_it_holds(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if "hide-input" in cell.metadata.get("tags", []):
            prompt = cell.metadata.get("mystnb", {}).get("code_prompt_show", "")
            assert prompt.startswith("Code: "), cell.source[:60]


@each_chapter
def test_a_chapter_can_be_read_to_its_end(path):
    words = visible = 0
    for cell in nbformat.read(path, as_version=4).cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            words += len(re.sub(r"```+\S*|:\w+:.*", "", cell.source).split())
        elif not tags & {"hide-input", "hide-cell", "remove-input", "remove-cell"}:
            visible += sum(bool(line.strip()) for line in cell.source.splitlines())
    assert words < (3000 if path.stem == "12_imagenet" else 2700)
    assert visible <= 150


@each_chapter
def test_exercises_are_graded_and_have_a_hint_before_the_solution(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = re.findall(r"^`{3,}\{exercise\} ?(.*)$", text, re.M)
    assert all(re.match(r"★{1,3} (Pencil first: )?(Implement: )?\w", title) for title in titles)
    assert text.count("{dropdown} Hint") >= len(titles)


@each_chapter
def test_every_claim_that_a_chapter_makes_is_in_the_ledger(path):
    assert set(claims_called(path)) <= set(read_claims())


def test_every_claim_that_is_not_only_quoted_is_measured_by_a_chapter():
    called = {name for path in CHAPTERS for name in claims_called(path)}
    tested = {name for name, claim in read_claims().items() if claim.how != "quoted"}
    assert tested - called == set()


def test_the_table_of_contents_names_every_page_and_no_other():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    pages = [p for p in (ROOT / "chapters").iterdir() if p.suffix in (".ipynb", ".md")]
    assert sorted([toc["root"], *files]) == sorted(f"chapters/{page.stem}" for page in pages)


def public_names(module):
    own = [
        n
        for n, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
    ]
    return set(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def test_every_public_module_stands_in_the_api_reference():
    """Under its own name, or under that of its package where that gives all its names."""
    found = [m.name for m in pkgutil.walk_packages(bnlib.__path__, "bnlib.")]
    public = {name for name in found if "._" not in name and "__" not in name}
    text = (ROOT / "chapters" / "api.md").read_text()
    listed = re.findall(r"automodule:: (\S+)", text)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= public
    for name in sorted(public - set(listed)):
        module, package = map(importlib.import_module, (name, name.rpartition(".")[0]))
        if not hasattr(module, "__path__"):
            assert package.__name__ in listed, name
            assert public_names(module) <= public_names(package), name
