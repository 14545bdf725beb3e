"""Means of probabilities and the paired bootstrap: against the mathematics and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from made_up_probabilities import made_up, make, several
from scipy import stats
from torch import Tensor

from bnlib.imagenet.evaluation.calibration import brier_score, log_losses
from bnlib.imagenet.evaluation.ensembles import arithmetic_mean, geometric_mean, paired_bootstrap


@several
@given(made_up)
def test_averages_are_probabilities(case: tuple[int, int, int, int, float]) -> None:
    members, _ = make(*case)
    for mean in (arithmetic_mean(members), geometric_mean(members)):
        assert (mean >= 0).all()
        torch.testing.assert_close(mean.sum(1), torch.ones_like(mean[:, 0]))


@several
@given(made_up)
def test_the_mean_of_one_network_or_of_equal_networks_is_that_network(
    case: tuple[int, int, int, int, float],
) -> None:
    (first, *_), _ = make(*case)
    for mean in (arithmetic_mean, geometric_mean):
        torch.testing.assert_close(mean([first]), first, atol=1e-10, rtol=1e-6)
        torch.testing.assert_close(mean([first] * 3), first, atol=1e-10, rtol=1e-6)


@several
@given(made_up)
def test_on_every_single_image_the_log_loss_of_the_mean_is_no_more_than_the_mean_log_loss(
    case: tuple[int, int, int, int, float],
) -> None:
    members, labels = make(*case)
    # nothing so small that the logarithm is cut off
    members = [0.999 * member + 0.001 / member.shape[1] for member in members]
    mean = torch.stack([log_losses(member, labels) for member in members]).mean(0)
    for average in (arithmetic_mean, geometric_mean):
        assert (log_losses(average(members), labels) <= mean + 1e-9).all()


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


def test_the_geometric_mean_is_the_softmax_of_the_mean_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(geometric_mean(list(logits.softmax(2))), logits.mean(0).softmax(1))


@pytest.mark.parametrize("mean", [arithmetic_mean, geometric_mean])
def test_networks_that_do_not_match_have_no_mean(mean) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=r"equal size, but got \[2, 3\] .* and \[2, 4\]"):
        mean([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(RuntimeError, match="non-empty"):
        mean([])


# The bootstrap


def difference(means: Tensor) -> Tensor:
    return means[:, 1] - means[:, 0]


def test_the_interval_is_scipys_percentile_bootstrap_of_pairs() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    wrong = np.stack([rng.random(400) < 0.8 * hard, rng.random(400) < 0.6 * hard], 1).astype(float)
    ours = paired_bootstrap(torch.from_numpy(wrong), difference)
    theirs = stats.bootstrap(
        (wrong[:, 0], wrong[:, 1]),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000, batch=2000,
        random_state=1,
    ).confidence_interval  # fmt: skip
    assert ours.estimate == pytest.approx(wrong[:, 1].mean() - wrong[:, 0].mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.004)


def test_pairing_narrows_the_interval_of_predictors_that_fail_on_the_same_images() -> None:
    wrong = torch.zeros(200, 2)
    wrong[:80] = 1
    wrong[:5, 1] = 0  # the second has five more right
    paired = paired_bootstrap(wrong, difference)
    unpaired = paired_bootstrap(torch.stack([wrong[:, 0], wrong[:, 1].roll(100)], 1), difference)
    assert paired.estimate == unpaired.estimate == pytest.approx(-0.025)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)
    same = paired_bootstrap(wrong[:, [0, 0]], difference)
    assert same == (0, 0, 0)


def test_the_bootstrap_is_drawn_in_pieces_and_repeats_with_its_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    first = paired_bootstrap(values, difference, seed=3)
    assert paired_bootstrap(values, difference, seed=3) == first
    assert paired_bootstrap(values, difference, seed=4) != first
    monkeypatch.setattr("bnlib.imagenet.evaluation.ensembles._AT_ONCE", 120)
    pieces = paired_bootstrap(values, difference, seed=3)
    assert pieces.estimate == first.estimate
    assert pieces == pytest.approx(first, abs=0.05)


def test_a_bootstrap_of_nothing_is_refused() -> None:
    for values in (torch.ones(0, 2), torch.ones(5)):
        with pytest.raises(ValueError, match=r"must be \(images, k\)"):
            paired_bootstrap(values, difference)
