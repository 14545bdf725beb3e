"""Averages, calibration, recorded predictions: against scikit-learn, SciPy, the mathematics."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet_runs import QUIET, TINY, image_folder, use_tiny_network
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from bnlib import runs
from bnlib.__main__ import FAILED, FINISHED, main
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.evaluation.accuracy import Accuracy, ensemble, load_network, probabilities
from bnlib.imagenet.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    log_losses,
    reliability,
    with_temperature,
)
from bnlib.imagenet.evaluation.ensembles import arithmetic_mean, geometric_mean, paired_bootstrap
from bnlib.imagenet.evaluation.predictions import (
    ACCURACIES,
    Evaluated,
    accuracies,
    read_probabilities,
    record_accuracies,
    record_probabilities,
    run_name,
)
from bnlib.imagenet.recipes import RECIPES
from bnlib.imagenet.training.loop import train
from bnlib.runs import RunError

pytestmark = pytest.mark.usefixtures("tiny")
CHAPTER = Path(__file__).parents[2] / "chapters" / "13_ensemble.ipynb"
#: Seed, networks, images, classes and sharpness of made-up probabilities.
made_up = st.tuples(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(2, 9),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)
several = settings(max_examples=50, deadline=None)


def make(
    seed: int, networks: int, images: int, classes: int, sharpness: float
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(networks, images, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    return list((sharpness * logits).softmax(2)), labels


def log_loss_of(predicted: Tensor, labels: Tensor) -> float:
    return float(log_losses(predicted, labels).mean())


# Averages


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


def test_averaging_can_make_every_answer_wrong_that_two_of_three_networks_have_right() -> None:
    right, wrong = [0.51, 0.49], [0.0, 1.0]
    members = [
        torch.tensor([wrong if image == network else right for image in range(3)])
        for network in range(3)
    ]
    labels = torch.zeros(3, dtype=torch.int64)
    assert all(ensemble([member], labels).top1 == pytest.approx(2 / 3) for member in members)
    assert ensemble(members, labels).top1 == 0


@pytest.mark.parametrize("mean", [arithmetic_mean, geometric_mean])
def test_networks_that_do_not_match_have_no_mean(mean) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"\[\(2, 3\), \(2, 4\)\]; one needed"):
        mean([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(ValueError, match=r"\[\]; one needed"):
        mean([])


# Scores


@several
@given(made_up)
def test_scores_are_scikit_learns(case: tuple[int, int, int, int, float]) -> None:
    (predicted, *_), labels = make(*case)
    classes = np.arange(predicted.shape[1])
    floored = predicted.clamp_min(1e-12)
    theirs = log_loss(labels, floored / floored.sum(1, keepdim=True), labels=classes)
    assert log_loss_of(predicted, labels) == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert log_loss_of(predicted, labels) == pytest.approx(
        ensemble([predicted], labels).loss, rel=1e-9
    )
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


# Calibration


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
        ensemble([predicted], labels).top1
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


# The bootstrap


def difference(means: Tensor) -> Tensor:
    return means[:, 1] - means[:, 0]


def test_the_interval_is_scipys_percentile_bootstrap_of_pairs() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    wrong = np.stack([rng.random(400) < 0.8 * hard, rng.random(400) < 0.6 * hard], 1).astype(float)
    ours = paired_bootstrap(torch.from_numpy(wrong), difference, draws=20_000)
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
    first = paired_bootstrap(values, difference, draws=700, seed=3)
    assert paired_bootstrap(values, difference, draws=700, seed=3) == first
    assert paired_bootstrap(values, difference, draws=700, seed=4) != first
    monkeypatch.setattr("bnlib.imagenet.evaluation.ensembles._AT_ONCE", 120)
    pieces = paired_bootstrap(values, difference, draws=700, seed=3)
    assert pieces.estimate == first.estimate
    assert pieces == pytest.approx(first, abs=0.05)
    wider = paired_bootstrap(values, difference, draws=700, level=0.999)
    assert wider.low < first.low < first.high < wider.high


def test_a_bootstrap_of_nothing_is_refused() -> None:
    for values in (torch.ones(0, 2), torch.ones(5)):
        with pytest.raises(ValueError, match=r"must be \(images, k\)"):
            paired_bootstrap(values, difference)
    with pytest.raises(ValueError, match=r"level is 1.0 and draws 10"):
        paired_bootstrap(torch.ones(5, 2), difference, level=1.0, draws=10)
    with pytest.raises(ValueError, match=r"draws 0"):
        paired_bootstrap(torch.ones(5, 2), difference, draws=0)


# Recorded


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks with other seeds."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_network(monkeypatch)
        for seed, folder in enumerate(folders):
            train(TINY.replace(name=f"network-{seed}", seed=seed), data, folder, QUIET)
    return folders


@pytest.mark.parametrize("batch", [1, 7, 30, 1000])
@pytest.mark.parametrize("crops", [1, 10])
def test_probabilities_do_not_depend_on_how_many_crops_go_through_at_once(
    crops: int, batch: int, data: Path, trained: list[Path]
) -> None:
    (network, recipe), source = load_network(trained[0]), open_source(data, "val")
    found, labels, _ = probabilities(network, source, recipe.image_size, crops, batch=batch)
    expected, others, _ = probabilities(network, source, recipe.image_size, crops, batch=crops)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(labels, others)


def test_recorded_probabilities_are_those_of_the_network_to_four_digits(
    data: Path, trained: list[Path], tmp_path: Path
) -> None:
    (network, recipe), source = load_network(trained[1]), open_source(data, "val")
    for crops in (1, 144):
        folder = record_probabilities(trained[1], data, crops, "small", tmp_path, device="cpu")
        assert folder == tmp_path / "small" / run_name("network-1", crops)
        expected, labels, _ = probabilities(network, source, recipe.image_size, crops)
        found = read_probabilities("network-1", crops, "small", root=tmp_path)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.probabilities, expected.double(), rtol=2e-4, atol=0)
        torch.testing.assert_close(
            found.probabilities.sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-15
        )
        digits = {len(entry.lstrip("0.").replace(".", "")) for line in
                  (folder / "metrics.csv").read_text().splitlines()[1:]
                  for entry in line.split(",")[1:] if "e" not in entry}  # fmt: skip
        assert max(digits) == 4
        manifest = runs.read("small", folder.name, root=tmp_path).manifest
        assert manifest["seed"] == [1]
        assert manifest["dataset"] == {"name": str(data / "val"), "sha256": source.fingerprint()}
        assert manifest["configuration"]["recipes"][0]["name"] == "network-1"


def test_nothing_is_recorded_when_an_image_cannot_be_read(
    trained: list[Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    damaged = image_folder(tmp_path_factory)
    (damaged / "val" / "bee" / "001.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"nothing is recorded: bee/001.JPEG"):
        record_probabilities(trained[0], damaged, 1, "small", tmp_path, device="cpu")
    assert not (tmp_path / "small").exists()


def test_probabilities_that_were_not_recorded_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="small/probabilities-none-10"):
        read_probabilities("none", 10, "small", root=tmp_path)


def test_evaluate_and_ensemble_record_what_they_print(
    data: Path,
    trained: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    on = ["--data", str(data), "--device", "cpu"]
    assert main(["evaluate", str(trained[0]), *on, "--record", "single"]) == FINISHED
    root = tmp_path / "elsewhere"
    more = ["--crops", "10", "--record", "six", "--record-root", str(root)]
    assert main(["ensemble", *map(str, trained), *on, *more]) == FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"recorded in {Path('recorded', ACCURACIES, 'single')}"
    assert lines[-1] == f"recorded in {root / ACCURACIES / 'six'}"

    (alone,) = accuracies("single", root=tmp_path / "recorded")
    assert alone[:3] == ("network-0", 1, 1)
    assert lines[0] == f"{trained[0]}: 1 crops: {alone.accuracy}"
    rows = accuracies("six", root=root)
    assert [row[:3] for row in rows] == [
        ("network-0", 1, 10), ("network-1", 1, 10), ("ensemble", 2, 10),
    ]  # fmt: skip
    for row, line in zip(rows, lines[2:], strict=False):
        assert line.endswith(str(row.accuracy))
        assert row.accuracy.n == 12
    manifest = runs.read(ACCURACIES, "six", root=root).manifest
    assert manifest["seed"] == [0, 1]
    assert [each["name"] for each in manifest["configuration"]["recipes"]] == [
        "network-0", "network-1",
    ]  # fmt: skip


def test_without_the_flag_nothing_is_recorded(
    data: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(trained[0]), "--data", str(data), "--device", "cpu"]) == FINISHED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../six", "a/b", "..", "."])
def test_a_name_that_would_leave_the_folder_is_refused_before_hours_of_work(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(data, "val")
    with pytest.raises(ValueError, match="cannot name a run"):
        record_accuracies(name, [], recipes=[], source=source, started=0.0, root=tmp_path)
    assert main(["evaluate", "no checkpoint", "--data", str(data), "--record", name]) == FAILED
    assert f"{name!r} cannot name a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_accuracy_survives_the_recording(data: Path, tmp_path: Path) -> None:
    members, labels = make(0, 3, 200, 6, 1.0)
    rows = [
        Evaluated(f"network-{k}", 1, crops, ensemble([member], labels))
        for (k, member), crops in itertools.product(enumerate(members), (1, 144))
    ]
    source = open_source(data, "val")
    record_accuracies("a", rows, recipes=[TINY], source=source, started=0.0, root=tmp_path)
    for before, after in zip(rows, accuracies("a", root=tmp_path), strict=True):
        assert before[:3] == after[:3]
        assert after.accuracy.top1 == pytest.approx(before.accuracy.top1, rel=1e-5)
        assert after.accuracy.loss == pytest.approx(before.accuracy.loss, rel=1e-5)
        assert after.accuracy.interval() == pytest.approx(before.accuracy.interval(), rel=1e-4)


# Chapter 13


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
    chapter = nbformat.read(CHAPTER, as_version=4)
    ids = [cell.id for cell in chapter.cells]
    chapter.cells = chapter.cells[: ids.index("own-rows") + 1]  # what follows needs other runs
    nbformat.write(chapter, tmp_path / "beginning.ipynb")
    done = papermill.execute_notebook(
        str(tmp_path / "beginning.ipynb"),
        None,
        parameters={"runs_root": str(tmp_path)},
        kernel_name="python3",
        progress_bar=False,
    )
    page = next(cell for cell in done.cells if cell.id == "figure-4").outputs[0].data["text/html"]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in page.split("<tr>")[2:]]
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
