"""The experiment of section 4.1, small: what its history says and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bnlib import mnist, runs
from bnlib.mnist import Figure1, Replica, both, train
from bnlib.mnist import recordings as mnist_recordings

SMALL = Figure1(
    dataset="digits",
    seeds=(0, 1),
    steps=200,
    evaluate_every=50,
    learning_rate=0.2,
    weight_std=0.1,
    population_batches=5,
)


@pytest.fixture(scope="module")
def histories() -> tuple[mnist.History, mnist.History]:
    return both(SMALL, keep_inputs=True)


def test_a_history_has_the_documented_shapes(histories: tuple[mnist.History, ...]) -> None:
    for history in histories:
        assert history.steps.tolist() == [0, 50, 100, 150, 200]
        assert history.test_accuracy.shape == (2, 5)
        assert history.test_accuracy_batch.shape == (2, 5)
        assert history.train_loss.shape == (2, 5)
        assert history.percentiles.shape == (2, 5, 3, 100)
        assert history.inputs is not None
        assert history.inputs.shape == (2, 5, 297, 100)
        assert history.dataset["name"] == "digits"
        assert np.isnan(history.train_loss[:, 0]).all()
        assert np.isfinite(history.train_loss[:, 1:]).all()


def test_with_bn_the_network_reads_real_digits_while_without_it_has_hardly_begun(
    histories: tuple[mnist.History, ...],
) -> None:
    normalized, plain = histories
    assert normalized.test_accuracy[:, -1].min() > 0.85
    assert normalized.test_accuracy[:, -1].min() > plain.test_accuracy[:, -1].max() + 0.2
    assert normalized.test_accuracy[:, 0].max() < 0.35


def test_percentiles_are_those_of_the_inputs(histories: tuple[mnist.History, ...]) -> None:
    for history in histories:
        expected = np.percentile(
            history.inputs.astype(np.float32), mnist.PERCENTILES, axis=2, keepdims=False
        )
        np.testing.assert_allclose(
            history.percentiles, np.moveaxis(expected, 0, 2), rtol=2e-3, atol=2e-3
        )


def test_the_typical_unit_has_the_median_drift(histories: tuple[mnist.History, ...]) -> None:
    for history in histories:
        drift = history.drift()[1]
        unit = history.typical_unit(1)
        assert (drift < drift[unit]).sum() == 50


def test_the_same_seed_gives_the_same_curves_whatever_else_is_trained_or_looked_at() -> None:
    alone = train(SMALL, [Replica(1, 0.2, 0.1)])
    beside = train(replace(SMALL, evaluate_every=200), [Replica(7, 0.1, 1.0), Replica(1, 0.2, 0.1)])
    np.testing.assert_allclose(
        alone.percentiles[0, -1], beside.percentiles[1, -1], rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        alone.test_accuracy[0, -1], beside.test_accuracy[1, -1], atol=1.5 / 297
    )


def test_evaluations_include_the_start_and_the_end() -> None:
    history = train(replace(SMALL, steps=70, seeds=(0,)))
    assert history.steps.tolist() == [0, 50, 70]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 1, "batch_size must be at least 2, got 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("weight_std", float("nan"), "weight_std must be positive, got nan"),
        ("seeds", (), "at least one seed"),
        ("hidden", (), "at least one seed and one layer"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})


def test_every_recording_can_be_made_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist_recordings, "LEARNING_RATES", (0.1, 1.0))
    monkeypatch.setattr(mnist_recordings, "WEIGHT_STDS", (0.03, 0.1))
    small = replace(SMALL, steps=20, evaluate_every=2)
    for record in mnist_recordings.RECORDINGS.values():
        record(small, tmp_path)
    names = runs.names(mnist_recordings.EXPERIMENT, root=tmp_path)
    assert {"sweep-bn", "sweep-plain", "slow-bn", "best-plain", "units-slow-bn"} <= set(names)
    for name in names:
        run = runs.read(mnist_recordings.EXPERIMENT, name, root=tmp_path)
        assert run.manifest["dataset"]["name"] == "digits"
        assert run["step"].max() == 20
        assert run.manifest["configuration"]["normalize"] == name.endswith("-bn")
    slow = runs.read(mnist_recordings.EXPERIMENT, "slow-bn", root=tmp_path)
    assert slow.table("p50", rows="seed", columns="step").values.shape == (2, 11)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of slow, best; got 'fast'"):
        mnist_recordings.configured(SMALL, "fast", True)
