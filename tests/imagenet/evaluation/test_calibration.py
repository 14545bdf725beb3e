"""Scores, reliability and temperature: against scikit-learn and the mathematics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_probabilities import made_up, make, several
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from bnlib.imagenet.evaluation.accuracy import Accuracy, count_correct
from bnlib.imagenet.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    log_losses,
    reliability,
    with_temperature,
)


def log_loss_of(predicted: Tensor, labels: Tensor) -> float:
    return float(log_losses(predicted, labels).mean())


@several
@given(made_up)
def test_scores_are_scikit_learns(case: tuple[int, int, int, int, float]) -> None:
    (predicted, *_), labels = make(*case)
    classes = np.arange(predicted.shape[1])
    floored = predicted.clamp_min(1e-12)
    theirs = log_loss(labels, floored / floored.sum(1, keepdim=True), labels=classes)
    assert log_loss_of(predicted, labels) == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    counted = Accuracy.from_counts(count_correct(floored.log(), labels))
    assert log_loss_of(predicted, labels) == pytest.approx(counted.loss, rel=1e-9)
    # one class against the rest, summed over the classes: the same however scikit-learn scales
    one_by_one = sum(
        brier_score_loss((labels == k).int(), predicted[:, k].clamp(0, 1), pos_label=1)
        for k in classes
    )
    assert brier_score(predicted, labels) == pytest.approx(one_by_one, abs=1e-12)


def test_the_brier_score_goes_from_zero_to_two() -> None:
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    assert brier_score(certain, torch.tensor([0])) == 0
    assert brier_score(certain, torch.tensor([2])) == 2


def test_a_class_that_was_ruled_out_costs_a_finite_log_loss() -> None:
    loss = log_losses(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(-math.log(1e-12))


@pytest.mark.parametrize("score", [log_losses, brier_score, reliability, fit_temperature])
def test_shapes_that_do_not_fit_are_refused(score) -> None:  # type: ignore[no-untyped-def]
    for predicted, labels in (
        (torch.ones(3, 2) / 2, torch.zeros(2, dtype=torch.int64)),
        (torch.ones(3) / 3, torch.zeros(3, dtype=torch.int64)),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="are needed"):
            score(predicted, labels)


@several
@given(made_up, st.integers(1, 40))
def test_bins_hold_equally_many_images_and_all_of_them(
    case: tuple[int, int, int, int, float], bins: int
) -> None:
    (predicted, *_), labels = make(*case)
    bins = min(bins, len(labels))
    found = reliability(predicted, labels, bins)
    assert found.images.sum() == len(labels)
    assert found.images.max() - found.images.min() <= 1
    assert (found.confidence.diff() >= -1e-12).all(), "in the order of confidence"
    weights = found.images / len(labels)
    assert float((found.accuracy * weights).sum()) == pytest.approx(
        float((predicted.argmax(1) == labels).double().mean())
    )
    assert float((found.confidence * weights).sum()) == pytest.approx(
        float(predicted.amax(1).mean())
    )


def test_the_calibration_error_by_hand() -> None:
    predicted = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 1, 1])
    # two bins: confidence 0.6 and half right, 0.9 and all right
    assert expected_calibration_error(predicted, labels, 2) == pytest.approx((0.1 + 0.1) / 2)
    assert expected_calibration_error(predicted, labels, 1) == pytest.approx(abs(0.75 - 0.75))


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    (predicted,), _ = make(1, 1, 60_000, 4, 1.5)
    generator = torch.Generator().manual_seed(2)
    labels = torch.multinomial(predicted, 1, generator=generator)[:, 0]
    assert expected_calibration_error(predicted, labels) < 0.01
    assert fit_temperature(predicted, labels) == pytest.approx(1, abs=0.03)
    surer = with_temperature(predicted, 0.4)
    assert expected_calibration_error(surer, labels) > 0.1
    assert fit_temperature(surer, labels) == pytest.approx(2.5, rel=0.03), "which undoes it"


@pytest.mark.parametrize("bins", [0, 4])
def test_more_bins_than_images_are_refused(bins: int) -> None:
    with pytest.raises(ValueError, match=f"bins is {bins}; with 3 images it must be 1 to 3"):
        reliability(torch.ones(3, 2) / 2, torch.zeros(3, dtype=torch.int64), bins)


@several
@given(made_up, st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_of_the_classes_and_can_be_undone(
    case: tuple[int, int, int, int, float], temperature: float
) -> None:
    (predicted, *_), _ = make(*case[:4], 1.0)
    changed = with_temperature(predicted, temperature)
    torch.testing.assert_close(changed.sum(1), torch.ones_like(changed[:, 0]))
    assert torch.equal(changed.argmax(1), predicted.argmax(1))
    assert (changed.amax(1) >= predicted.amax(1) - 1e-9).all() == (temperature <= 1) or (
        temperature == pytest.approx(1, abs=1e-6)
    )
    if temperature > 0.3:  # else probabilities fall below the smallest that is kept apart
        torch.testing.assert_close(
            with_temperature(changed, 1 / temperature), predicted, atol=1e-6, rtol=1e-4
        )


def test_the_fitted_temperature_is_the_best_on_a_grid() -> None:
    (predicted,), _ = make(3, 1, 300, 5, 2.0)
    softer = with_temperature(predicted, 1.7)
    labels = torch.multinomial(softer, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    best = fit_temperature(predicted, labels)
    grid = [best * factor for factor in (0.5, 0.8, 0.97, 1.03, 1.25, 2.0)]
    least = log_loss_of(with_temperature(predicted, best), labels)
    assert all(log_loss_of(with_temperature(predicted, t), labels) > least for t in grid)


def test_the_temperature_stops_at_its_limits() -> None:
    predicted = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert 0.01 <= fit_temperature(predicted, torch.tensor([0, 1])) < 0.05
    assert fit_temperature(predicted, torch.tensor([1, 0])) == pytest.approx(100)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="it must be positive"):
            with_temperature(predicted, temperature)
