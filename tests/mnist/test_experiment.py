"""The experiment of section 4.1, small: what its history says and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnlib import mnist, runs
from bnlib.mnist import Figure1, Network, both, digits, mini_batches, train
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
    alone = train(SMALL, [Network(1, 0.2, 0.1)])
    beside = train(replace(SMALL, evaluate_every=200), [Network(7, 0.1, 1.0), Network(1, 0.2, 0.1)])
    np.testing.assert_allclose(
        alone.percentiles[0, -1], beside.percentiles[1, -1], rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        alone.test_accuracy[0, -1], beside.test_accuracy[1, -1], atol=1.5 / 297
    )


def plain_network(config: Figure1, network: Network) -> nn.Sequential:
    """One network out of torch's own layers, its weights drawn one layer after the other."""
    generator = torch.Generator().manual_seed(network.seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((784, *config.hidden, 10)):
        last = outputs == 10
        layer = nn.Linear(inputs, outputs, bias=last or not config.normalize)
        weight = network.weight_std * torch.randn(inputs, outputs, generator=generator)
        layer.weight.data = weight.T.clone()
        if layer.bias is not None:
            layer.bias.data.zero_()
        norm = [] if last or not config.normalize else [nn.BatchNorm1d(outputs, eps=config.eps)]
        layers += [layer, *norm, *([] if last else [nn.Sigmoid()])]
    return nn.Sequential(*layers)


def set_population_statistics(network: nn.Sequential, batches: list[Tensor]) -> None:
    """Algorithm 2, lines 7 to 10, layer after layer."""
    values = batches
    for layer in network:
        inputs, values = values, [layer.train()(x) for x in values]
        if isinstance(layer, nn.BatchNorm1d):  # after the passes, which move these
            layer.running_mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
            layer.running_var = torch.stack([x.var(0) for x in inputs]).mean(0)


@pytest.mark.parametrize("normalize", [True, False])
def test_every_curve_is_that_of_the_plain_loop_with_torchs_own_layers(normalize: bool) -> None:
    networks = [Network(0, 0.1, 0.1), Network(1, 1.0, 0.5), Network(1, 3.0, 0.01)]
    config = replace(SMALL, normalize=normalize, steps=40, evaluate_every=20, hidden=(30, 20))
    history = train(config, networks, keep_inputs=True)
    data = digits.load("digits")
    images, test = (digits.binarize(x) for x in (data.train_images, data.test_images))
    whole = len(test) - len(test) % 60
    for index, network in enumerate(networks):
        plain = plain_network(config, network)
        optimizer = torch.optim.SGD(plain.parameters(), lr=network.learning_rate)
        batches = mini_batches(images, data.train_labels, 60, [network.seed])
        for evaluation in range(3):
            losses = []
            for x, labels in islice(batches, 20 if evaluation else 0):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(plain.train()(x[0]), labels[0])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if evaluation:
                got = history.train_loss[index, evaluation]
                assert got == pytest.approx(np.mean(losses), rel=1e-4)
            with torch.no_grad():
                own = torch.cat([plain(x) for x in test[:whole].split(60)])
                sample = mini_batches(images, data.train_labels, 60, [network.seed], stream=1)
                set_population_statistics(plain, [x[0].clone() for x, _ in islice(sample, 5)])
                logits, inputs = plain.eval()(test), plain[:-2](test)
            expected = (logits.argmax(1) == data.test_labels).float().mean().item()
            assert history.test_accuracy[index, evaluation] == pytest.approx(expected, abs=1 / 290)
            if normalize:
                expected = (own.argmax(1) == data.test_labels[:whole]).float().mean().item()
            got = history.test_accuracy_batch[index, evaluation]
            assert got == pytest.approx(expected, abs=1 / 230)
            np.testing.assert_allclose(
                history.inputs[index, evaluation], inputs.numpy(), rtol=2e-3, atol=2e-3
            )


def test_a_network_that_diverges_stays_at_chance_and_leaves_the_others_alone() -> None:
    config = replace(SMALL, normalize=False, steps=100, seeds=(0,))
    history = train(config, [Network(0, 1e38, 0.3), Network(0, 0.2, 0.1)])
    assert np.isnan(history.train_loss[0]).all()
    share = (digits.load("digits").test_labels == 0).float().mean().item()
    assert history.test_accuracy[0, 1:] == pytest.approx([share, share])
    alone = train(config, [Network(0, 0.2, 0.1)])
    np.testing.assert_allclose(history.train_loss[1], alone.train_loss[0], rtol=1e-4)


def test_training_leaves_the_global_random_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    train(replace(SMALL, steps=1))
    assert torch.equal(torch.random.get_rng_state(), before)


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
    small = replace(SMALL, steps=10, evaluate_every=2)
    for record in mnist_recordings.RECORDINGS.values():
        record(small, tmp_path)
    names = runs.names(mnist_recordings.EXPERIMENT, root=tmp_path)
    assert {"sweep-bn", "sweep-plain", "slow-bn", "best-plain", "units-slow-bn"} <= set(names)
    for name in names:
        run = runs.read(mnist_recordings.EXPERIMENT, name, root=tmp_path)
        assert run.manifest["dataset"]["name"] == "digits"
        assert run["step"].max() == 10
        assert run.manifest["configuration"]["normalize"] == name.endswith("-bn")
    slow = runs.read(mnist_recordings.EXPERIMENT, "slow-bn", root=tmp_path)
    table = slow.frame().pivot(index="seed", columns="step", values="p50")
    assert table.index.tolist() == [0, 1]
    assert table.columns.tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.skipif(
    not (digits.data_root() / "MNIST" / "raw").is_dir(),
    reason="MNIST is not on disk; set BNLIB_DATA to a folder that has it",
)
@pytest.mark.parametrize("name", ["slow-bn", "slow-plain"])
def test_the_recorded_runs_come_out_again(name: str) -> None:
    setting, network = name.split("-")
    config = replace(Figure1(dataset="mnist"), steps=500, seeds=(0, 1))
    history = train(mnist_recordings.configured(config, setting, network == "bn"))
    recorded = runs.read(mnist_recordings.EXPERIMENT, name)
    assert history.dataset == recorded.manifest["dataset"]
    for index, seed in enumerate(config.seeds):
        run = recorded.where(seed=seed)
        for row in range(2):
            assert run["step"][row] == history.steps[row]
            for column, got in (
                ("test_accuracy", history.test_accuracy),
                ("test_accuracy_batch", history.test_accuracy_batch),
            ):
                assert got[index, row] == pytest.approx(run[column][row], abs=3e-4)
            unit = int(run["unit"][row])
            for rank, percentile in enumerate(mnist.PERCENTILES):
                got = history.percentiles[index, row, rank, unit]
                assert got == pytest.approx(run[f"p{percentile}"][row], rel=1e-3, abs=1e-4)
        assert history.train_loss[index, 1] == pytest.approx(run["train_loss_nats"][1], rel=1e-4)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of slow, best, peak; got 'fast'"):
        mnist_recordings.configured(SMALL, "fast", True)
