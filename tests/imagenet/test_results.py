"""Curves over seeds, steps to a level, Figure 3's rows; and a full run that drops into chapter 12.

The runs in here are made up, and say so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st
from imagenet_runs import TINY, changed, image_folder, use_tiny_network

from bnlib import runs
from bnlib.book.tables import table
from bnlib.imagenet import RECIPES
from bnlib.imagenet.evaluation.curves import (
    Curves,
    first_reach,
    read_curves,
    recorded_networks,
    root_of,
)
from bnlib.imagenet.evaluation.figure3 import (
    PRINTED_LEVEL,
    figure3,
    printed_figure3,
    recorded_speed,
)
from bnlib.imagenet.training.loop import train

MADE_UP = {"name": "made up for a test, nothing was trained", "sha256": "0" * 64}


def make_up(
    root: Path,
    name: str,
    top1: Sequence[float],
    *,
    every: int = 100,
    experiment: str = "imagenet",
    verdict: str = "finished",
    seed: int = 0,
    network: str | None = None,
    **recipe: Any,
) -> None:
    """A recorded run with these held-out accuracies, as the trainer would write it."""
    network = network or name.partition("-seed-")[0]
    chosen = RECIPES.get(network, RECIPES["bn-x5"]).replace(name=name, seed=seed, **recipe)
    steps = [every * (number + 1) for number in range(len(top1))]
    rows = [
        (step, "held out", 1 - value, value, value) for step, value in zip(steps, top1, strict=True)
    ]
    rows += [
        (step, "training", 2 - value, value, math.nan)
        for step, value in zip(steps, top1, strict=True)
    ]
    names = ("step", "part", "cross_entropy_nats", "top1", "top5")
    columns = list(zip(*sorted(rows), strict=True)) or [()] * 5
    runs.write(
        experiment,
        name,
        dict(zip(names, columns, strict=True)),
        configuration={"recipe": dataclasses.asdict(chosen)},
        seed=seed,
        dataset=MADE_UP,
        started="2026-01-01T00:00:00Z",
        duration_s=0,
        verdict=verdict,
        command="made up for a test",
        root=root,
    )


# Steps to a level


def test_a_level_between_two_evaluations_is_interpolated() -> None:
    assert first_reach(np.array([100, 200, 300]), np.array([0.1, 0.2, 0.4]), 0.25) == 225


def test_a_level_that_is_never_reached_takes_infinitely_many_steps() -> None:
    assert first_reach(np.array([100, 200]), np.array([0.1, 0.2]), 0.3) == math.inf
    assert first_reach(np.array([]), np.array([]), 0.3) == math.inf
    assert first_reach(np.array([100]), np.array([math.nan]), 0.3) == math.inf


def test_a_curve_that_begins_above_the_level_gives_its_first_evaluation() -> None:
    assert first_reach(np.array([100, 200]), np.array([0.5, 0.6]), 0.3) == 100


def test_the_first_of_several_crossings_counts() -> None:
    values = np.array([0.0, 0.4, 0.0, 0.4])
    assert first_reach(np.array([0, 100, 200, 300]), values, 0.2) == 50


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 2), (2, 2))])
def test_steps_and_values_must_be_equally_long_vectors(shapes: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="equally long vectors"):
        first_reach(np.zeros(shapes[0]), np.zeros(shapes[1]), 0.5)


rises = st.lists(st.floats(0.01, 1), min_size=2, max_size=20)


@given(rises=rises, share=st.floats(0, 1))
def test_on_a_rising_curve_it_is_the_inverse_of_numpys_interpolation(
    rises: list[float], share: float
) -> None:
    values = np.cumsum(rises)
    steps = 100.0 * np.arange(1, len(values) + 1)
    level = values[0] + share * (values[-1] - values[0])
    found = first_reach(steps, values, min(level, values[-1]))
    assert found == pytest.approx(np.interp(level, values, steps), rel=1e-6)


@given(
    values=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=20),
    levels=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_higher_level_is_never_reached_earlier(
    values: list[float], levels: tuple[float, float]
) -> None:
    steps = np.arange(len(values))
    low, high = (first_reach(steps, np.array(values), level) for level in sorted(levels))
    assert low <= high


# Curves


def test_the_seeds_of_a_network_are_read_together_and_apart_from_other_networks(
    tmp_path: Path,
) -> None:
    make_up(tmp_path, "bn-x5-seed-10", [0.3, 0.5], seed=10)
    make_up(tmp_path, "bn-x5-seed-2", [0.1, 0.3], seed=2)
    make_up(tmp_path, "bn-x5-sigmoid-seed-2", [0.0, 0.1], seed=2)
    make_up(tmp_path, "bn-x5-without-l2-seed-2", [0.0, 0.2], seed=2)
    make_up(tmp_path, "bn-x30", [0.4, 0.6])
    assert recorded_networks("imagenet", root=tmp_path) == [
        "bn-x30",
        "bn-x5",
        "bn-x5-sigmoid",
        "bn-x5-without-l2",
    ]
    curves = read_curves("imagenet", "bn-x5", root=tmp_path)
    assert curves.seeds == (2, 10)
    assert curves.steps.tolist() == [100, 200]
    assert curves.mean == pytest.approx([0.2, 0.4])
    assert curves.best() == (pytest.approx(0.4), 200)
    assert [point.value for point in curves.best_each()] == [0.3, 0.5]
    assert curves.steps_to(0.3) == pytest.approx(150)
    assert curves.steps_to_each(0.3) == pytest.approx([200, 100])
    assert curves.diverged_at == (None, None)
    assert curves.recipe["learning_rate"] == RECIPES["bn-x5"].learning_rate
    assert read_curves("imagenet", "bn-x30", root=tmp_path).seeds == (0,)


def test_the_part_and_the_column_can_be_chosen(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5", [0.25, 0.5])
    read = {"root": tmp_path, "column": "cross_entropy_nats"}
    assert read_curves("imagenet", "bn-x5", **read).mean == pytest.approx([0.75, 0.5])
    training = read_curves("imagenet", "bn-x5", part="training", **read)
    assert training.mean == pytest.approx([1.75, 1.5])


def test_a_seed_that_diverged_takes_the_mean_with_it_from_there_on(tmp_path: Path) -> None:
    make_up(tmp_path, "inception-x5-seed-0", [0.1, 0.2, 0.3])
    make_up(tmp_path, "inception-x5-seed-1", [0.1], seed=1, verdict="diverged at step 143")
    curves = read_curves("imagenet", "inception-x5", root=tmp_path)
    assert curves.diverged_at == (None, 143)
    assert np.isnan(curves.mean).tolist() == [False, True, True]
    assert curves.best() == (pytest.approx(0.1), 100)
    assert curves.steps_to(0.2) == math.inf
    assert curves.best_each()[0].value == pytest.approx(0.3)


def test_a_run_that_diverged_before_its_first_line_has_no_points(tmp_path: Path) -> None:
    make_up(tmp_path, "inception-x5", [], verdict="diverged at step 7")
    curves = read_curves("imagenet", "inception-x5", root=tmp_path)
    assert curves.values.shape == (1, 0)
    assert curves.diverged_at == (7,)
    assert math.isnan(curves.best().value)
    assert curves.steps_to(0.1) == math.inf


def test_a_network_without_runs_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x30", [0.4])
    with pytest.raises(runs.RunError, match=r"'bn-x5' in 'imagenet'; there are runs of: bn-x30"):
        read_curves("imagenet", "bn-x5", root=tmp_path)
    assert recorded_networks("nothing", root=tmp_path) == []


def test_runs_evaluated_at_different_steps_are_not_read_as_one_network(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5-seed-0", [0.1, 0.2])
    make_up(tmp_path, "bn-x5-seed-1", [0.1], every=150, seed=1)
    with pytest.raises(ValueError, match="was not evaluated at the steps of the other runs"):
        read_curves("imagenet", "bn-x5", root=tmp_path)


def test_runs_of_different_recipes_are_not_read_as_one_network(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5-seed-0", [0.1])
    make_up(tmp_path, "bn-x5-seed-1", [0.1], seed=1, dropout=0.3)
    with pytest.raises(ValueError, match=r"bn-x5-seed-1 has dropout 0.3, other runs of bn-x5 0.0"):
        read_curves("imagenet", "bn-x5", root=tmp_path)


def test_another_folder_is_read_only_where_it_has_the_experiment(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5", [0.1])
    assert root_of("imagenet", tmp_path) == tmp_path
    assert root_of("gpu-training", tmp_path) == runs.data_folder() / "runs"
    assert root_of("imagenet") == runs.data_folder() / "runs"


def test_what_the_trainer_records_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = image_folder(tmp_path_factory), tmp_path_factory.mktemp("run")
    use_tiny_network(monkeypatch)
    small = TINY.replace(name="bn-x5-seed-5", steps=4)
    train(small, folder, out, changed(eval_every=2, experiment="made-up"))
    curves: Curves = read_curves("made-up", "bn-x5", root=out / "recorded")
    assert curves.seeds == (5,)
    assert curves.steps.tolist() == [2, 4]
    assert curves.recipe == dataclasses.asdict(small)
    loss = read_curves(
        "made-up", "bn-x5", part="training", column="cross_entropy_nats", root=out / "recorded"
    )
    assert loss.steps.tolist() == [1, 2, 3, 4]
    assert np.isfinite(loss.mean).all()


# Figure 3


def test_a_row_has_steps_to_the_baselines_best_the_speed_up_and_the_maximum(
    tmp_path: Path,
) -> None:
    make_up(tmp_path, "inception", [0.1, 0.2, 0.3, 0.4])
    make_up(tmp_path, "bn-x5-seed-0", [0.3, 0.5, 0.45, 0.5])
    make_up(tmp_path, "bn-x5-seed-1", [0.1, 0.5, 0.55, 0.5], seed=1)
    make_up(tmp_path, "bn-x5-sigmoid", [0.1, 0.1, 0.1, 0.2])
    networks = ["inception", "bn-x5", "bn-x5-sigmoid"]
    plain, fast, low = figure3("imagenet", networks, root=tmp_path)
    assert (plain.steps_to_level, plain.speedup, plain.max_accuracy_at) == (400, 1, 400)
    assert fast.seeds == 2
    assert fast.initial_learning_rate == RECIPES["bn-x5"].learning_rate
    assert fast.steps_to_level == pytest.approx(100 + 100 * 2 / 3)  # the mean: 0.2, 0.5, ...
    assert fast.steps_range == (pytest.approx(150), pytest.approx(175))
    assert fast.speedup == pytest.approx(400 / fast.steps_to_level)
    assert (fast.max_accuracy, fast.max_accuracy_at) == (pytest.approx(0.5), 200)
    assert fast.max_range == (pytest.approx(0.5), pytest.approx(0.55))
    assert (low.steps_to_level, low.speedup) == (math.inf, 0)
    assert fast.batch_size == 32
    at_02 = figure3("imagenet", networks, level=0.2, root=tmp_path)
    assert [row.steps_to_level for row in at_02] == [200, 100, 400]


def test_a_speed_up_counts_examples_where_mini_batches_differ(tmp_path: Path) -> None:
    make_up(tmp_path, "inception", [0.1, 0.2, 0.3, 0.4])
    make_up(tmp_path, "bn-x5-batch-64", [0.4], network="bn-x5", batch_size=64)
    (row,) = figure3("imagenet", ["bn-x5-batch-64"], root=tmp_path)
    assert (row.steps_to_level, row.speedup) == (100, 2)


def test_without_the_baseline_a_level_must_be_given_and_there_is_no_speed_up(
    tmp_path: Path,
) -> None:
    make_up(tmp_path, "bn-x5", [0.5, 0.73])
    with pytest.raises(runs.RunError, match="no run of the baseline 'inception'; give the level"):
        figure3("imagenet", ["bn-x5"], root=tmp_path)
    (row,) = figure3("imagenet", ["bn-x5"], level=PRINTED_LEVEL, root=tmp_path)
    assert 100 < row.steps_to_level < 200
    assert math.isnan(row.speedup)


def test_the_printed_figure_has_the_papers_numbers_and_gaps() -> None:
    printed = {row.recipe: row for row in printed_figure3()}
    assert list(printed) == ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]
    for name, row in printed.items():
        assert row.initial_learning_rate == pytest.approx(RECIPES[name].learning_rate)
    steps = {name: row.steps_to_level for name, row in printed.items()}
    assert steps["inception"] is not None
    assert steps["bn-x5"] is not None
    assert steps["inception"] / steps["bn-x5"] == pytest.approx(14.8, abs=0.05)
    assert steps["bn-x5-sigmoid"] is None
    assert printed["inception"].max_accuracy == PRINTED_LEVEL
    assert [row.max_accuracy_at for row in printed.values()].count(None) == 4
    assert printed["bn-x30"].max_accuracy_at == RECIPES["bn-x30"].steps
    implied = [name for name, row in printed.items() if row.learning_rate_is == "implied"]
    assert implied == ["bn-baseline", "bn-x5-sigmoid"]


# Speed


def make_up_speed(root: Path, name: str, columns: dict[str, list[Any]]) -> None:
    runs.write(
        "gpu-training",
        name,
        columns,
        configuration={},
        seed=0,
        dataset=MADE_UP,
        started="2026-01-01T00:00:00Z",
        duration_s=0,
        command="made up for a test",
        root=root,
    )


def test_the_fastest_training_of_our_network_at_the_batch_is_found(tmp_path: Path) -> None:
    assert recorded_speed(root=tmp_path) is None
    make_up_speed(tmp_path, "data-path", {"form": ["packed"], "images_per_s": [9.0]})
    assert recorded_speed(root=tmp_path) is None
    columns = {
        "network": ["ours", "ours", "ours", "port"],
        "mode": ["eager", "graph", "graph", "eager"],
        "batch": [32, 32, 128, 32],
        "images_per_s": [100.0, 200.0, 800.0, 900.0],
    }
    make_up_speed(tmp_path, "network", columns)
    found = recorded_speed(root=tmp_path)
    assert found is not None
    assert (found.images_per_s, found.mode) == (200, "graph")
    large = recorded_speed(128, root=tmp_path)
    assert large is not None
    assert large.images_per_s == 800


# The book


def test_a_table_refuses_rows_that_do_not_fit_its_head() -> None:
    page = table(["a", "b"], [["1", "<b>2</b>"]]).data
    assert "<th>a</th><th>b</th>" in page
    assert "<td>1</td><td><b>2</b></td>" in page
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        table(["a", "b"], [["1"]])


def test_a_run_of_full_size_drops_into_chapter_12(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x30", [0.3, 0.6, 0.7, 0.7412, 0.7431], every=1_000_000)
    make_up(
        tmp_path,
        "bn-x30-batch-256",
        [0.3, 0.6, 0.7, 0.7412],
        every=100_000,
        network="bn-x30",
        batch_size=256,
    )
    executed = tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        str(Path(__file__).parents[2] / "chapters" / "12_imagenet.ipynb"),
        str(executed),
        {"runs_root": str(tmp_path), "live_steps": 0, "speed_steps": 0, "images_per_s": 500.0},
        progress_bar=False,
    )
    cells = {cell["id"]: cell for cell in nbformat.read(executed, as_version=4).cells}
    shown = "".join(
        output.get("text", "") + output.get("data", {}).get("text/html", "")
        for output in cells["table-full"].outputs
    )
    assert MADE_UP["name"] in shown
    assert "3.5 M" in shown  # to 72.2 %, between 0.7 and 0.7412
    assert "74.3" in shown
    assert "353,398 of 256" in shown
    hours = cells["table-hours"].outputs[0]["data"]["text/html"]
    assert f"{6_000_000 * 32 / 500 / 3600 / 24:.1f} days" in hours
