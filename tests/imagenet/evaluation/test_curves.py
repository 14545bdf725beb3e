"""Curves of recorded runs over seeds, and the steps that they take to a level."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from imagenet_runs import TINY, changed
from made_up_runs import make_up

from bnlib import runs
from bnlib.imagenet import RECIPES
from bnlib.imagenet.evaluation.curves import (
    Curves,
    figure3,
    read_curves,
    recorded_networks,
    root_of,
    steps_to_level,
)
from bnlib.imagenet.training.loop import train


def curve(steps: list[float] | np.ndarray, values: list[float] | np.ndarray) -> pd.Series:
    return pd.Series(np.asarray(values, dtype=float), index=steps)


# Steps to a level


def test_a_level_between_two_evaluations_is_interpolated() -> None:
    assert steps_to_level(curve([100, 200, 300], [0.1, 0.2, 0.4]), 0.25) == 225


def test_a_level_that_is_never_reached_takes_infinitely_many_steps() -> None:
    assert steps_to_level(curve([100, 200], [0.1, 0.2]), 0.3) == math.inf
    assert steps_to_level(curve([], []), 0.3) == math.inf
    assert steps_to_level(curve([100], [math.nan]), 0.3) == math.inf


def test_a_curve_that_begins_above_the_level_gives_its_first_evaluation() -> None:
    assert steps_to_level(curve([100, 200], [0.5, 0.6]), 0.3) == 100


def test_the_first_of_several_crossings_counts() -> None:
    assert steps_to_level(curve([0, 100, 200, 300], [0.0, 0.4, 0.0, 0.4]), 0.2) == 50


def test_after_a_gap_the_level_is_reached_where_the_curve_goes_on() -> None:
    assert steps_to_level(curve([100, 200, 300], [0.1, math.nan, 0.4]), 0.2) == 300


rises = st.lists(st.floats(0.01, 1), min_size=2, max_size=20)


@given(rises=rises, share=st.floats(0, 1))
def test_on_a_rising_curve_it_is_the_inverse_of_numpys_interpolation(
    rises: list[float], share: float
) -> None:
    values = np.cumsum(rises)
    steps = 100.0 * np.arange(1, len(values) + 1)
    level = values[0] + share * (values[-1] - values[0])
    found = steps_to_level(curve(steps, values), min(level, values[-1]))
    assert found == pytest.approx(np.interp(level, values, steps), rel=1e-6)


@given(
    values=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=20),
    levels=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_higher_level_is_never_reached_earlier(
    values: list[float], levels: tuple[float, float]
) -> None:
    low, high = (
        steps_to_level(curve(np.arange(len(values)), values), level) for level in sorted(levels)
    )
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
    assert curves.values.index.tolist() == [100, 200]
    assert curves.mean.tolist() == pytest.approx([0.2, 0.4])
    assert curves.values[10].tolist() == [0.3, 0.5]
    assert curves.steps_to(0.3) == pytest.approx(150)
    assert curves.steps_to_each(0.3) == pytest.approx([200, 100])
    assert curves.diverged_at == (None, None)
    assert curves.recipe["learning_rate"] == RECIPES["bn-x5"].learning_rate
    assert read_curves("imagenet", "bn-x30", root=tmp_path).seeds == (0,)


def test_the_part_and_the_column_can_be_chosen(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5", [0.25, 0.5])
    read = {"root": tmp_path, "column": "cross_entropy_nats"}
    assert read_curves("imagenet", "bn-x5", **read).mean.tolist() == pytest.approx([0.75, 0.5])
    training = read_curves("imagenet", "bn-x5", part="training", **read)
    assert training.mean.tolist() == pytest.approx([1.75, 1.5])


def test_a_seed_that_diverged_takes_the_mean_with_it_from_there_on(tmp_path: Path) -> None:
    make_up(tmp_path, "inception-x5-seed-0", [0.1, 0.2, 0.3])
    make_up(tmp_path, "inception-x5-seed-1", [0.1], seed=1, verdict="diverged at step 143")
    curves = read_curves("imagenet", "inception-x5", root=tmp_path)
    assert curves.diverged_at == (None, 143)
    assert np.isnan(curves.mean).tolist() == [False, True, True]
    assert curves.values[0].tolist() == [0.1, 0.2, 0.3]
    assert curves.steps_to(0.2) == math.inf
    (row,) = figure3("imagenet", ["inception-x5"], level=0.3, root=tmp_path).itertuples()
    assert (row.max_accuracy, row.max_accuracy_at) == (pytest.approx(0.1), 100)
    assert (row.max_low, row.max_high) == (pytest.approx(0.1), pytest.approx(0.3))
    assert (row.steps_low, row.steps_high) == (300, math.inf)


def test_a_run_that_diverged_before_its_first_line_has_no_points(tmp_path: Path) -> None:
    make_up(tmp_path, "inception-x5", [], verdict="diverged at step 7")
    curves = read_curves("imagenet", "inception-x5", root=tmp_path)
    assert curves.values.shape == (0, 1)
    assert curves.diverged_at == (7,)
    assert curves.steps_to(0.1) == math.inf
    (row,) = figure3("imagenet", ["inception-x5"], level=0.1, root=tmp_path).itertuples()
    assert np.isnan([row.max_accuracy, row.max_accuracy_at, row.max_low, row.max_high]).all()


def test_a_network_without_runs_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x30", [0.4])
    with pytest.raises(runs.RunError, match=r"'bn-x5' in 'imagenet'; there are runs of: bn-x30"):
        read_curves("imagenet", "bn-x5", root=tmp_path)
    assert recorded_networks("nothing", root=tmp_path) == []


def test_all_that_was_recorded_is_one_tidy_frame(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5-seed-0", [0.25, 0.5])
    make_up(tmp_path, "bn-x5-seed-3", [0.75], seed=3, verdict="diverged at step 150")
    frame = read_curves("imagenet", "bn-x5", root=tmp_path).frame()
    assert frame.columns.tolist() == [
        "network", "seed", "step", "part", "cross_entropy_nats", "top1", "top5",
    ]  # fmt: skip
    held_out = frame[frame["part"] == "held out"]
    assert held_out[["network", "seed", "step", "top1"]].to_numpy().tolist() == [
        ["bn-x5", 0, 100, 0.25], ["bn-x5", 0, 200, 0.5], ["bn-x5", 3, 100, 0.75],
    ]  # fmt: skip
    assert len(frame) == 2 * len(held_out)


def test_two_runs_of_one_seed_are_both_kept(tmp_path: Path) -> None:
    make_up(tmp_path, "bn-x5", [0.25])
    make_up(tmp_path, "bn-x5-seed-0", [0.75])
    curves = read_curves("imagenet", "bn-x5", root=tmp_path)
    assert curves.seeds == (0, 0)
    assert curves.mean.tolist() == [0.5]
    assert curves.values.to_numpy().tolist() == [[0.25, 0.75]]


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


@pytest.mark.usefixtures("tiny")
def test_what_the_trainer_records_can_be_read(data: Path, tmp_path: Path) -> None:
    small = TINY.replace(name="bn-x5-seed-5", steps=4)
    train(small, data, tmp_path, changed(eval_every=2, experiment="made-up"))
    curves: Curves = read_curves("made-up", "bn-x5", root=tmp_path / "recorded")
    assert curves.seeds == (5,)
    assert curves.values.index.tolist() == [2, 4]
    assert curves.recipe == dataclasses.asdict(small)
    loss = read_curves(
        "made-up", "bn-x5", part="training", column="cross_entropy_nats", root=tmp_path / "recorded"
    )
    assert loss.values.index.tolist() == [1, 2, 3, 4]
    assert np.isfinite(loss.mean).all()
