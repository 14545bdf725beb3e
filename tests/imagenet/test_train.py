"""The training loop: every recipe runs, and each step does what the recipe says."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_runs import (
    QUIET,
    SMALL,
    TINY,
    TinyNetwork,
    assert_same_end,
    changed,
    finished,
    forked,
    ranks,
    wait_for_step,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlib import population_statistics, runs
from bnlib.imagenet import RECIPES, Recipe, checkpoint, recipe
from bnlib.imagenet.data.folders import FolderSource, open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.evaluation.accuracy import evaluate, load_network
from bnlib.imagenet.evaluation.inference import predict
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.training.log import read_metrics
from bnlib.imagenet.training.loop import train
from bnlib.imagenet.training.state import weight_decay_on_weights

PLAIN = TINY.replace(normalization="none", dropout=0.0, photometric=0.0)


class Watched:
    """What the optimizer saw at each step: gradients, rate and decay; and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []
        self.groups: list[list[dict[str, Any]]] = []


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen, original = Watched(), torch.optim.SGD.step

    def step(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        groups = optimizer.param_groups
        seen.groups.append([{k: v for k, v in g.items() if k != "params"} for g in groups])
        parameters = [p for group in groups for p in group["params"]]
        seen.gradients.append([p.grad.clone() for p in parameters])
        result = original(optimizer, *arguments)
        seen.weights.append([p.detach().clone() for p in parameters])
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return seen


def initial(recipe: Recipe) -> TinyNetwork:
    torch.manual_seed(recipe.seed)
    return TinyNetwork(recipe).train()


def in_optimizers_order(model: nn.Module, values: dict[str, Tensor]) -> list[Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [values[names[id(p)]] for g in weight_decay_on_weights(model, 0) for p in g["params"]]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return in_optimizers_order(model, found)


def first_batch(recipe: Recipe, data: Path) -> tuple[Tensor, Tensor]:
    _, images, labels = next(batches(open_source(data, "train"), recipe))
    return images, labels


def rows(out: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if key in row]


# The networks of the paper


@pytest.mark.parametrize("name", [*RECIPES, "bn-x30-member-6"])
def test_every_recipe_trains_and_evaluates_images_end_to_end(
    name: str, data: Path, tmp_path: Path
) -> None:
    names = ("image_size", "num_classes", "batch_size", "shards", "statistics_batches")
    width = 1.0 if name == "bn-x5" else SMALL.width
    small = recipe(name).replace(steps=2, width=width, **{n: getattr(SMALL, n) for n in names})
    assert train(small, data, tmp_path, changed(eval_batch=5)).finished
    losses = [row["loss"] for row in rows(tmp_path, "loss")]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    (evaluation,) = [row["evaluation"] for row in rows(tmp_path, "evaluation")]
    assert evaluation["n"] == 12
    assert math.isfinite(evaluation["loss"])
    network, found = load_network(tmp_path)
    assert found == small
    assert not network.training
    record = runs.read("imagenet", name, root=tmp_path / "recorded")
    assert record.manifest["verdict"] == "finished"
    assert record.where(part="training")["step"].tolist() == [1, 2]
    assert record.where(part="held out")["step"].tolist() == [2]
    assert record.where(part="training")["cross_entropy_nats"] == pytest.approx(losses, rel=1e-4)
    shutil.rmtree(tmp_path)  # a checkpoint is 120 MB


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_learns_the_images_by_heart(
    precision: str, data: Path, tmp_path: Path, tiny: None
) -> None:
    easy = TINY.replace(
        batch_size=12, steps=150, min_area=0.9, photometric=0.0, dropout=0.0, learning_rate=0.2
    )
    train(easy.replace(precision=precision), data, tmp_path, changed(log_every=50))
    losses = [row["loss"] for row in rows(tmp_path, "loss")]
    assert losses[-1] < losses[0] < 1.5
    assert losses[-1] < 0.8


# One step


@pytest.mark.usefixtures("tiny")
def test_without_normalization_micro_batches_give_the_whole_batchs_gradients(
    data: Path, tmp_path: Path, watched: Watched
) -> None:
    for accumulate in (1, 2, 4):
        one = PLAIN.replace(steps=1, accumulate=accumulate)
        train(one, data, tmp_path / f"{accumulate}", QUIET)
    whole, *parts = watched.gradients
    assert any(gradient.abs().max() > 1e-3 for gradient in whole)
    for some in parts:
        torch.testing.assert_close(some, whole, atol=1e-6, rtol=1e-4)
    losses = [rows(tmp_path / f"{a}", "loss")[0]["loss"] for a in (1, 2, 4)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.usefixtures("tiny")
def test_batch_normalization_normalizes_each_micro_batch_by_itself(
    data: Path, tmp_path: Path, watched: Watched
) -> None:
    normalized = TINY.replace(dropout=0.0, steps=1)
    train(normalized.replace(accumulate=2), data, tmp_path, QUIET)
    images, labels = first_batch(normalized, data)
    model = initial(normalized)
    parts = [
        gradients(model, cross_entropy(model(x), y))
        for x, y in zip(images.chunk(2), labels.chunk(2), strict=True)
    ]
    means = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    torch.testing.assert_close(watched.gradients[0], means, atol=1e-6, rtol=1e-4)
    model = initial(normalized)
    whole = gradients(model, cross_entropy(model(images), labels))
    assert max((a - b).abs().max() for a, b in zip(whole, means, strict=True)) > 1e-3


@pytest.mark.usefixtures("tiny")
def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(data: Path) -> None:
    """Even for the greatest seeds, whose products torch's generator would not take."""
    seen = []
    original = nn.Dropout.forward

    def forward(layer: nn.Dropout, x: Tensor) -> Tensor:
        if layer.training:
            seen.append(tuple(original(layer, torch.ones(64)).tolist()))
        return original(layer, x)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nn.Dropout, "forward", forward)
        for seed in (0, 1, 2**63 - 1):
            out = data.parent / f"dropout {seed}"
            assert train(TINY.replace(steps=3, seed=seed), data, out, QUIET).finished
    assert len(set(seen)) == len(seen) == 9


@pytest.mark.usefixtures("tiny")
def test_each_steps_rate_decay_and_momentum_are_the_recipes_across_a_resumption(
    data: Path, tmp_path: Path, watched: Watched
) -> None:
    steps_per_epoch = 36 // 4
    stairs = TINY.replace(
        steps=20, lr_decay=0.5, lr_decay_epochs=0.7, momentum=0.8, weight_decay=0.003
    )
    train(stairs.replace(steps=9), data, tmp_path, QUIET)
    train(stairs, data, tmp_path, changed(adapt=True))
    rates = [groups[0]["lr"] for groups in watched.groups]
    expected = [0.05 * 0.5 ** math.floor(step / (0.7 * steps_per_epoch)) for step in range(20)]
    assert len(set(expected)) == 4
    assert rates == pytest.approx(expected)
    assert [row["learning_rate"] for row in rows(tmp_path, "loss")] == pytest.approx(expected)
    for weights, others in watched.groups:
        assert others["lr"] == weights["lr"]
        assert weights["momentum"] == others["momentum"] == 0.8
        assert (weights["weight_decay"], others["weight_decay"]) == (0.003, 0.0)


@pytest.mark.parametrize("normalization", ["batch", "none", "per-activation-last"])
def test_the_l2_penalty_is_on_the_weights_of_convolutions_and_classifiers_only(
    normalization: str,
) -> None:
    with torch.device("meta"):
        model = SMALL.replace(normalization=normalization, stem="separable").network()
    weights, others = weight_decay_on_weights(model, 0.1)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in weights["params"]}
    free = {names[id(p)] for p in others["params"]}
    assert decayed | free == set(names.values())
    assert not decayed & free
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # gamma per activation has three dimensions; a convolution's weight four, a classifier's two
    assert decayed == {name for name, shape in shapes.items() if len(shape) in (2, 4)}
    assert all(name.endswith((".bias", ".weight")) for name in free)
    assert any(name.endswith(".weight") for name in free) == (normalization != "none")


@pytest.mark.usefixtures("tiny")
def test_the_averaged_weights_follow_their_formula(
    data: Path, tmp_path: Path, watched: Watched
) -> None:
    train(TINY.replace(polyak=0.35, steps=8), data, tmp_path, QUIET)
    expected = watched.weights[0]
    for step, weights in enumerate(watched.weights[1:], 1):
        decay = min(0.35, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights, strict=True)]
    average = checkpoint.load(tmp_path)["average"]
    found = in_optimizers_order(TinyNetwork(TINY), average)
    torch.testing.assert_close(found, expected)
    assert not all(torch.equal(a, w) for a, w in zip(found, watched.weights[-1], strict=True))


@pytest.mark.usefixtures("tiny")
def test_without_averaging_the_checkpoint_has_no_average(data: Path, tmp_path: Path) -> None:
    train(TINY.replace(polyak=0.0), data, tmp_path, QUIET)
    assert checkpoint.load(tmp_path)["average"] == {}
    network, _ = load_network(tmp_path)
    trained = checkpoint.load(tmp_path)["model"]
    assert all(torch.equal(p, trained[name]) for name, p in network.named_parameters())


# Evaluation


@pytest.mark.usefixtures("tiny")
def test_evaluation_normalizes_with_algorithm_2s_statistics_of_the_next_mini_batches(
    data: Path, tmp_path: Path
) -> None:
    train(TINY.replace(statistics_batches=5), data, tmp_path, QUIET)
    state = checkpoint.load(tmp_path)
    network = TinyNetwork(TINY)
    network.load_state_dict(state["average"])
    stream = batches(open_source(data, "train"), TINY, start_step=TINY.steps)
    population_statistics(network, [images for _, images, _ in itertools.islice(stream, 5)])
    evaluated = load_network(tmp_path)[0].state_dict()
    assert evaluated["norm2.num_batches_tracked"] == 5
    for name, value in network.state_dict().items():
        torch.testing.assert_close(evaluated[name], value)
    assert not torch.equal(evaluated["norm2.running_var"], state["model"]["norm2.running_var"])


@pytest.mark.usefixtures("tiny")
def test_evaluation_with_moving_averages_takes_those_of_training(
    data: Path, tmp_path: Path
) -> None:
    train(TINY.replace(statistics="moving"), data, tmp_path, QUIET)
    state, evaluated = checkpoint.load(tmp_path)["model"], load_network(tmp_path)[0].state_dict()
    for layer, kind in itertools.product(("norm1", "norm2"), ("running_mean", "running_var")):
        assert torch.equal(evaluated[f"{layer}.{kind}"], state[f"{layer}.{kind}"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("statistics", ["population", "moving"])
def test_an_evaluation_leaves_training_untouched(
    statistics: str, data: Path, tmp_path: Path
) -> None:
    chosen = TINY.replace(statistics=statistics)
    train(chosen, data, tmp_path / "none", QUIET)
    train(chosen, data, tmp_path / "some", changed(eval_every=2))
    assert [row["step"] for row in rows(tmp_path / "some", "evaluation")] == [2, 4, 6, 8]
    assert_same_end(tmp_path / "none", tmp_path / "some")
    losses = [[row["loss"] for row in rows(tmp_path / name, "loss")] for name in ("none", "some")]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("tiny")
def test_a_run_is_evaluated_at_the_steps_asked_for_and_at_its_end(
    data: Path, tmp_path: Path
) -> None:
    train(TINY, data, tmp_path, changed(eval_at="2 5"))
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [2, 5, TINY.steps]
    with pytest.raises(ValueError, match="eval_at is '2 five'"):
        changed(eval_at="2 five")


@pytest.mark.usefixtures("tiny")
def test_two_processes_share_a_mini_batch_and_average_their_statistics(
    data: Path, tmp_path: Path
) -> None:
    short = TINY.replace(steps=3, dropout=0.0, statistics_batches=3)
    assert finished(*ranks(2, short, data, [tmp_path], QUIET)) == [0, 0]
    state = checkpoint.load(tmp_path)
    source, found = open_source(data, "train"), []
    for rank in (0, 1):
        network = TinyNetwork(short)
        network.load_state_dict(state["average"])
        stream = batches(source, short, start_step=3, rank=rank, world=2)
        population_statistics(network, [images for _, images, _ in itertools.islice(stream, 3)])
        found.append(network.state_dict())
    evaluated = load_network(tmp_path)[0].state_dict()
    for layer, kind in itertools.product(("norm1", "norm2"), ("running_mean", "running_var")):
        a, b = (each[f"{layer}.{kind}"] for each in found)
        assert not torch.equal(a, b)
        torch.testing.assert_close(evaluated[f"{layer}.{kind}"], (a + b) / 2)
    (evaluation,) = [row["evaluation"] for row in rows(tmp_path, "evaluation")]
    assert evaluation["n"] == 12, "each process has evaluated its half"


@pytest.mark.usefixtures("tiny")
def test_without_normalization_two_processes_learn_what_one_learns(
    data: Path, tmp_path: Path
) -> None:
    train(PLAIN, data, tmp_path / "one", QUIET)
    parts = PLAIN.replace(accumulate=2)
    assert finished(*ranks(2, parts, data, [tmp_path / "two"], QUIET)) == [0, 0]
    one, two = (checkpoint.load(tmp_path / name)["model"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)
    losses = [[row["loss"] for row in rows(tmp_path / name, "loss")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.usefixtures("tiny")
def test_a_resumption_neither_lists_the_images_again_nor_looks_at_their_sizes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TINY.replace(steps=4), data, tmp_path, QUIET)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the images are listed again")

    monkeypatch.setattr(FolderSource, "_list", refuse)
    monkeypatch.setattr(FolderSource, "_names_and_sizes", refuse)
    assert train(TINY, data, tmp_path, changed(adapt=True)).finished
    with pytest.raises(AssertionError, match="listed again"):
        train(TINY, data, tmp_path / "another", QUIET)


# Divergence

WILD = PLAIN.replace(learning_rate=1e8, steps=40)


@pytest.mark.usefixtures("tiny")
def test_divergence_is_a_result_with_its_step_and_no_broken_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    verdicts = set()
    for log_every in (1, 4, 100):
        out = tmp_path / str(log_every)
        options = changed(log_every=log_every, save_every=1 if log_every == 1 else 1000)
        verdict = train(WILD, data, out, options)
        verdicts.add(verdict)
        assert verdict.diverged
        record = runs.read("imagenet", WILD.name, root=out / "recorded")
        assert record.verdict == verdict
        assert read_metrics(out / "metrics.jsonl")[-1]["verdict"] == str(verdict)
        for path in checkpoint.checkpoints(out):
            weights = checkpoint.load(path)["model"].values()
            assert all(bool(weight.isfinite().all()) for weight in weights)
        assert train(WILD, data, out, options) == verdict, "the same again from a checkpoint"
    assert len(verdicts) == 1, "the step does not depend on how often one looks"


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_stopped_after_it_diverged_saves_no_broken_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = torch.optim.SGD.step, 0

    def step(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    verdict = train(WILD, data, tmp_path, changed(log_every=1000))
    assert verdict.diverged
    assert calls == 30
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("statistics", ["population", "moving"])
@pytest.mark.parametrize("rate", [1e2, 1e10, 1e20])
def test_a_normalized_network_whose_statistics_overflow_has_diverged(
    rate: float, statistics: str, data: Path, tmp_path: Path
) -> None:
    """Its loss can stay finite, as a variance of infinity makes activations 0."""
    wild = TINY.replace(learning_rate=rate, steps=30, statistics=statistics)
    verdict = train(wild, data, tmp_path, changed(eval_every=1, save_every=1))
    assert verdict.diverged
    record = runs.read("imagenet", wild.name, root=tmp_path / "recorded")
    assert record.verdict == verdict
    for path in checkpoint.checkpoints(tmp_path):
        values = checkpoint.load(path)["model"].values()
        assert all(bool(value.isfinite().all()) for value in values)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("wild", [WILD, TINY.replace(learning_rate=1e10, steps=30)])
def test_two_processes_agree_on_divergence(wild: Recipe, data: Path, tmp_path: Path) -> None:
    assert finished(*ranks(2, wild, data, [tmp_path], changed(eval_every=1))) == [0, 0]
    verdict = read_metrics(tmp_path / "metrics.jsonl")[-1]["verdict"]
    assert verdict.startswith("diverged at step ")


# What does not fit


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "multiple of 3"),
        ({"batch_size": 64}, "at most 36"),
        ({"num_classes": 2}, "--num-classes 3"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_the_remedy(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(TINY.replace(**changes), data, tmp_path, QUIET)
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_gpu_that_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cpu"):
        train(TINY, data, tmp_path, changed(device="cuda"))


def test_synchronized_normalization_without_gpus_is_refused(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert finished(*ranks(2, TINY.replace(sync_bn=True), data, [tmp_path], QUIET)) == [1, 1]
    assert "Leave --sync-bn out" in capfd.readouterr().err


def test_synchronized_normalization_per_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="sync_bn cannot join statistics per activation"):
        TINY.replace(sync_bn=True, normalization="per-activation-last")


# Real images


def taken(path: Path, split: str, each: int) -> Iterator[tuple[str, bytes]]:
    """The first images of four classes, read from the archive's start."""
    counts: Counter[str] = Counter()
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or parts[0] != split:
                continue
            if parts[1] not in counts and len(counts) == 4:
                if min(counts.values()) == each:
                    return
                continue
            if counts[parts[1]] < each and (file := archive.extractfile(member)):
                counts[parts[1]] += 1
                yield member.name, file.read()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("BNLIB_DATA", "")) / "tiny-imagenet-100"
    if not (folder / "val.tar").exists():
        pytest.skip("BNLIB_DATA has no tiny-imagenet-100")
    root = tmp_path_factory.mktemp("real")
    for archive, split, each in (("train-0.tar", "train", 20), ("val.tar", "val", 2)):
        for name, content in taken(folder / archive, split, each):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def test_real_images_train_survive_a_kill_and_are_evaluated(
    real: Path, data: Path, tmp_path: Path
) -> None:
    source, held_out = open_source(real, "train"), open_source(real, "val")
    assert (len(source), len(held_out), len(source.classes)) == (80, 8, 4)
    small = SMALL.replace(num_classes=4, steps=10, batch_size=8, dropout=0.1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(small, real, whole, QUIET).finished
    process = forked(lambda: train(small, real, parts, changed(save_every=4, keep=1)))
    wait_for_step(parts, 4)
    process.kill()
    assert finished(process) == [-signal.SIGKILL]
    assert checkpoint.load(parts)["step"] in (4, 8)
    assert finished(forked(lambda: train(small, real, parts, QUIET))) == [0]
    assert_same_end(parts, whole)
    losses = [row["loss"] for row in rows(parts, "loss")]
    assert len(losses) == 10
    assert all(0 < loss < 10 for loss in losses)

    loaded = [load_network(path) for path in (whole, checkpoint.checkpoints(parts)[0])]
    assert [found for _, found in loaded] == [small, small]
    networks, group = [network for network, _ in loaded], Processes(0, 1, torch.device("cpu"))
    for crops in (1, 144):
        predicted = list(predict(networks, held_out, small.image_size, crops, group=group))
        rates = torch.cat([part.log_probabilities for part in predicted], 1).exp()
        assert rates.shape == (2, 8, 4)
        torch.testing.assert_close(rates.sum(2), torch.ones(2, 8))
        labels = torch.cat([part.labels for part in predicted])
        assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    result = evaluate(networks[0], held_out, small.image_size, group=group)
    assert (result.n, result.top5) == (8, 1.0)
    shutil.rmtree(tmp_path)
