"""Runs of the paper's own size drop into chapters 12 and 13."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from made_up_runs import MADE_UP, make_up

from bnlib.imagenet import RECIPES
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.evaluation.accuracy import Accuracy
from bnlib.imagenet.evaluation.predictions import Evaluated, record_accuracies

CHAPTERS = Path(__file__).parents[3] / "chapters"


def execute(
    chapter: str, last: str, folder: Path, also: Sequence[str] = (), **parameters: object
) -> dict[str, Any]:
    """The cells of a chapter by id, executed up to one of them; and some of the later ones."""
    notebook = nbformat.read(CHAPTERS / f"{chapter}.ipynb", as_version=4)
    ids = [cell.id for cell in notebook.cells]
    assert set(also) <= set(ids)
    first = notebook.cells[: ids.index(last) + 1]
    notebook.cells = first + [cell for cell in notebook.cells[len(first) :] if cell.id in also]
    nbformat.write(notebook, folder / "part.ipynb")
    parameters["runs_root"] = str(folder)
    done = papermill.execute_notebook(
        str(folder / "part.ipynb"), None, parameters, kernel_name="python3", progress_bar=False
    )
    return {cell.id: cell for cell in done.cells}


def test_a_run_of_full_size_drops_into_the_page_on_training(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x30", [0.3, 0.6, 0.7, 0.7412, 0.7431], every=1_000_000)
    make_up(
        tmp_path,
        "bn-x30-batch-256",
        [0.3, 0.6, 0.7, 0.7412],
        every=100_000,
        network="bn-x30",
        batch_size=256,
    )
    speed = {"live_steps": 0, "speed_steps": 0, "images_per_s": 500.0}
    cells = execute("train", "table-hours", tmp_path, **speed)
    page = cells["table-full"].outputs[0]["data"]["text/html"]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in page.split("<tr>")[1:]]
    made_up = [row for row in rows if row[1] == f"recorded, {MADE_UP['name']}"]
    assert [row[0] for row in made_up] == ["BN-x30", "bn-x30-batch-256"]
    assert made_up[0][3:] == ["3.5 M", "74.3"]  # to 72.2 %, between 0.7 and 0.7412
    assert made_up[1][3] == "0.4 M of 256"
    hours = cells["table-hours"].outputs[0]["data"]["text/html"]
    assert f"{6_000_000 * 32 / 500 / 3600 / 24:.1f} days" in hours


def test_the_chapter_shows_a_recorded_full_run_beside_the_papers_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = [
        Evaluated("bn-x30", 1, 1, Accuracy(0.7412, 0.9187, 50_000, 1.07)),
        Evaluated("ensemble", 6, 144, Accuracy(0.8017, 0.9533, 50_000, 0.77)),
    ]
    source = open_source(data, "val")
    monkeypatch.setattr(source, "location", "made up for a test")
    monkeypatch.setattr(source, "fingerprint", lambda: "made up")
    recipes = [RECIPES["bn-x30"]]
    record_accuracies(
        "made-up", made_up, recipes=recipes, source=source, started=0.0, root=tmp_path
    )
    cells = execute("13_ensemble", "own-rows", tmp_path)
    page = cells["figure-4"].outputs[0].data["text/html"]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in page.split("<tr>")[1:]]
    assert [row[0] for row in rows[:7]] == [
        "GoogLeNet ensemble", "Deep Image low-res", "Deep Image high-res", "Deep Image ensemble",
        "BN-Inception single crop", "BN-Inception multicrop", "BN-Inception ensemble",
    ]  # fmt: skip
    assert rows[6][1:] == ["224", "144", "6", "20.1", "4.9*"]
    assert [row[1:] for row in rows[7:]] == [
        ["224", "1", "1", "25.88", "8.13"],
        ["224", "144", "6", "19.83", "4.67"],
    ]
    assert all("made-up, 50,000 images of made up for a test" in row[0] for row in rows[7:])
