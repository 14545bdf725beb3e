"""Means of probabilities and their scores: against the mathematics and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from made_up_probabilities import made_up, make, several
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from bnlib.imagenet.evaluation.accuracy import Accuracy, count_correct
from bnlib.imagenet.evaluation.ensembles import arithmetic_mean, brier_score, log_losses


@several
@given(made_up)
def test_averages_are_probabilities(case: tuple[int, int, int, int, float]) -> None:
    members, _ = make(*case)
    mean = arithmetic_mean(members)
    assert (mean >= 0).all()
    torch.testing.assert_close(mean.sum(1), torch.ones_like(mean[:, 0]))


@several
@given(made_up)
def test_the_mean_of_one_network_or_of_equal_networks_is_that_network(
    case: tuple[int, int, int, int, float],
) -> None:
    (first, *_), _ = make(*case)
    for members in ([first], [first] * 3):
        torch.testing.assert_close(arithmetic_mean(members), first, atol=1e-10, rtol=1e-6)


@several
@given(made_up)
def test_on_every_single_image_the_log_loss_of_the_mean_is_no_more_than_the_mean_log_loss(
    case: tuple[int, int, int, int, float],
) -> None:
    members, labels = make(*case)
    # nothing so small that the logarithm is cut off
    members = [0.999 * member + 0.001 / member.shape[1] for member in members]
    mean = torch.stack([log_losses(member, labels) for member in members]).mean(0)
    assert (log_losses(arithmetic_mean(members), labels) <= mean + 1e-9).all()


@several
@given(made_up)
def test_the_brier_score_of_the_mean_is_the_mean_less_the_spread(
    case: tuple[int, int, int, int, float],
) -> None:
    members, labels = make(*case)
    mean = arithmetic_mean(members)
    spread = sum(float((member - mean).square().sum(1).mean()) for member in members)
    scores = sum(brier_score(member, labels) for member in members)
    count = len(members)
    assert brier_score(mean, labels) == pytest.approx((scores - spread) / count, abs=1e-12)


@several
@given(made_up)
def test_the_mean_is_no_surer_than_its_members_are_on_average(
    case: tuple[int, int, int, int, float],
) -> None:
    members, _ = make(*case)
    surest = torch.stack(members).amax(2).mean(0)
    assert (arithmetic_mean(members).amax(1) <= surest + 1e-12).all()


def test_networks_that_do_not_match_have_no_mean() -> None:
    with pytest.raises(RuntimeError, match=r"equal size, but got \[2, 3\] .* and \[2, 4\]"):
        arithmetic_mean([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(RuntimeError, match="non-empty"):
        arithmetic_mean([])


# Scores


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


@pytest.mark.parametrize("score", [log_losses, brier_score])
def test_shapes_that_do_not_fit_are_refused(score) -> None:  # type: ignore[no-untyped-def]
    for predicted, labels in (
        (torch.ones(3, 2) / 2, torch.zeros(2, dtype=torch.int64)),
        (torch.ones(3) / 3, torch.zeros(3, dtype=torch.int64)),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="are needed"):
            score(predicted, labels)
