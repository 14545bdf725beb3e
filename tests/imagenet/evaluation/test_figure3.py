"""Figure 3, as printed and from recorded runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from made_up_runs import make_up

from bnlib import runs
from bnlib.imagenet import RECIPES
from bnlib.imagenet.evaluation.curves import PRINTED_LEVEL, figure3, printed_figure3


def test_a_row_has_steps_to_the_baselines_best_the_speed_up_and_the_maximum(
    tmp_path: Path,
) -> None:
    make_up(tmp_path, "inception", [0.1, 0.2, 0.3, 0.4])
    make_up(tmp_path, "bn-x5-seed-0", [0.3, 0.5, 0.45, 0.5])
    make_up(tmp_path, "bn-x5-seed-1", [0.1, 0.5, 0.55, 0.5], seed=1)
    make_up(tmp_path, "bn-x5-sigmoid", [0.1, 0.1, 0.1, 0.2])
    networks = ["inception", "bn-x5", "bn-x5-sigmoid"]
    plain, fast, low = figure3("imagenet", networks, root=tmp_path).itertuples()
    assert (plain.steps_to_level, plain.speedup, plain.max_accuracy_at) == (400, 1, 400)
    assert fast.seeds == 2
    assert fast.initial_learning_rate == RECIPES["bn-x5"].learning_rate
    assert fast.steps_to_level == pytest.approx(100 + 100 * 2 / 3)  # the mean: 0.2, 0.5, ...
    assert (fast.steps_low, fast.steps_high) == (pytest.approx(150), pytest.approx(175))
    assert fast.speedup == pytest.approx(400 / fast.steps_to_level)
    assert (fast.max_accuracy, fast.max_accuracy_at) == (pytest.approx(0.5), 200)
    assert (fast.max_low, fast.max_high) == (pytest.approx(0.5), pytest.approx(0.55))
    assert (low.steps_to_level, low.speedup) == (math.inf, 0)
    assert fast.batch_size == 32
    at_02 = figure3("imagenet", networks, level=0.2, root=tmp_path)
    assert at_02["steps_to_level"].tolist() == [200, 100, 400]


def test_a_speed_up_counts_examples_where_mini_batches_differ(tmp_path: Path) -> None:
    make_up(tmp_path, "inception", [0.1, 0.2, 0.3, 0.4])
    make_up(tmp_path, "bn-x5-batch-64", [0.4], network="bn-x5", batch_size=64)
    (row,) = figure3("imagenet", ["bn-x5-batch-64"], root=tmp_path).itertuples()
    assert (row.steps_to_level, row.speedup) == (100, 2)


def test_without_the_baseline_a_level_must_be_given_and_there_is_no_speed_up(
    tmp_path: Path,
) -> None:
    make_up(tmp_path, "bn-x5", [0.5, 0.73])
    with pytest.raises(runs.RunError, match="no run of the baseline 'inception'; give the level"):
        figure3("imagenet", ["bn-x5"], root=tmp_path)
    (row,) = figure3("imagenet", ["bn-x5"], level=PRINTED_LEVEL, root=tmp_path).itertuples()
    assert 100 < row.steps_to_level < 200
    assert math.isnan(row.speedup)


def test_the_printed_figure_has_the_papers_numbers_and_gaps() -> None:
    printed = {row.recipe: row for row in printed_figure3().itertuples()}
    assert list(printed) == ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]
    for name, row in printed.items():
        assert row.initial_learning_rate == pytest.approx(RECIPES[name].learning_rate)
    steps = {name: row.steps_to_level for name, row in printed.items()}
    assert steps["inception"] / steps["bn-x5"] == pytest.approx(14.8, abs=0.05)
    assert math.isnan(steps["bn-x5-sigmoid"])
    assert printed["inception"].max_accuracy == PRINTED_LEVEL
    assert [math.isnan(row.max_accuracy_at) for row in printed.values()].count(True) == 4
    assert printed["bn-x30"].max_accuracy_at == RECIPES["bn-x30"].steps
    implied = [name for name, row in printed.items() if row.learning_rate_is == "implied"]
    assert implied == ["bn-baseline", "bn-x5-sigmoid"]
