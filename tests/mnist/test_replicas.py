"""The batched networks against the loop anyone would write with torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnlib.mnist import mini_batches
from bnlib.mnist.replicas import Replicas

SIZES = (30, 20, 15, 10, 4)


def torch_twin(replicas: Replicas, index: int) -> nn.Sequential:
    """The same network as one replica, out of torch's own layers, sharing its weights' values."""
    layers: list[nn.Module] = []
    for layer in replicas.hidden:
        inputs, units = layer.weight.shape[1:]
        linear = nn.Linear(inputs, units, bias=not replicas.normalize)
        linear.weight.data = layer.weight[index].T.clone()
        layers.append(linear)
        if replicas.normalize:
            layers.append(nn.BatchNorm1d(units, eps=replicas.eps))
        else:
            linear.bias.data.zero_()
        layers.append(nn.Sigmoid())
    top = nn.Linear(*replicas.top_weight.shape[1:])
    top.weight.data, top.bias.data = replicas.top_weight[index].T.clone(), torch.zeros(SIZES[-1])
    return nn.Sequential(*layers, top)


def training_set(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = (torch.rand(count, SIZES[0], generator=generator) < 0.3).float()
    return images, torch.randint(SIZES[-1], (count,), generator=generator)


@pytest.mark.parametrize("normalize", [True, False])
def test_every_replica_takes_the_steps_of_the_plain_loop(normalize: bool) -> None:
    seeds, rates, stds = (0, 1, 2), (0.1, 1.0, 0.5), (0.1, 0.5, 1.0)
    replicas = Replicas(seeds, stds, SIZES, normalize=normalize)
    images, labels = training_set()
    twins = [torch_twin(replicas, index) for index in range(3)]
    optimizers = [
        torch.optim.SGD(twin.parameters(), lr=rate) for twin, rate in zip(twins, rates, strict=True)
    ]
    batches = mini_batches(images, labels, 20, seeds)
    before = replicas.hidden[0].weight.clone()
    for _ in range(30):
        x, y = next(batches)
        expected = []
        for index, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(twin(x[index]), y[index])
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        got = replicas.step(x, y, torch.tensor(rates).view(3, 1, 1))
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert (replicas.hidden[0].weight - before).abs().max() > 1e-2
    for index, twin in enumerate(twins):
        linears = [module for module in twin if isinstance(module, nn.Linear)]
        ours = [*(layer.weight for layer in replicas.hidden), replicas.top_weight]
        for linear, weight in zip(linears, ours, strict=True):
            torch.testing.assert_close(weight[index].T, linear.weight, rtol=1e-3, atol=1e-4)
        norms = [module for module in twin if isinstance(module, nn.BatchNorm1d)]
        for norm, layer in zip(norms, replicas.hidden, strict=False):
            torch.testing.assert_close(layer.gamma[index, 0], norm.weight, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.beta[index, 0], norm.bias, rtol=1e-3, atol=1e-4)


def test_population_statistics_and_inference_are_those_of_bnlib_on_torch_layers() -> None:
    from bnlib.population import population_statistics

    replicas = Replicas((3,), (0.7,), SIZES, normalize=True)
    images, labels = training_set()
    batches = mini_batches(images, labels, 20, (3,))
    drawn = [next(batches)[0].clone() for _ in range(7)]
    replicas.estimate_population(drawn)
    twin = population_statistics(torch_twin(replicas, 0), [x[0] for x in drawn]).eval()
    norms = [module for module in twin if isinstance(module, nn.BatchNorm1d)]
    for norm, layer in zip(norms, replicas.hidden, strict=True):
        torch.testing.assert_close(layer.mean[0, 0], norm.running_mean)
        torch.testing.assert_close(layer.var[0, 0], norm.running_var)
    logits, inputs = replicas.infer(images)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], twin(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[0], twin[:-2](images), rtol=1e-4, atol=1e-5)


def test_replicas_do_not_influence_one_another() -> None:
    images, labels = training_set()
    results = []
    for seeds in ((4, 9), (9,)):
        replicas = Replicas(seeds, [0.3] * len(seeds), SIZES, normalize=True)
        batches = mini_batches(images, labels, 20, seeds)
        for _ in range(15):
            x, y = next(batches)
            replicas.step(x, y, torch.full((len(seeds), 1, 1), 0.3))
        results.append(replicas.hidden[1].weight[-1])
    torch.testing.assert_close(results[0], results[1])


def test_a_replica_that_diverges_leaves_the_others_finite() -> None:
    images, labels = training_set()
    replicas = Replicas((0, 1), (0.3, 0.3), SIZES, normalize=False)
    batches = mini_batches(images, labels, 20, (0, 1))
    for _ in range(5):
        x, y = next(batches)
        losses = replicas.step(x, y, torch.tensor([1e38, 0.1]).view(2, 1, 1))
    assert not losses[0].isfinite()
    assert losses[1].isfinite()


def test_an_epoch_shows_every_example_once_and_seeds_have_their_own_order() -> None:
    images = torch.arange(12.0).view(12, 1)
    batches = mini_batches(images, torch.arange(12), 4, (0, 1))
    epoch = [(x.clone(), y) for _, (x, y) in zip(range(3), batches, strict=False)]
    seen = torch.cat([y for _, y in epoch], dim=1)
    assert seen.sort(dim=1).values.tolist() == [list(range(12))] * 2
    assert seen[0].tolist() != seen[1].tolist()
    for x, y in epoch:
        assert x.squeeze(2).tolist() == y.float().tolist()


def test_a_mini_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="60 cannot be drawn from 12"):
        next(mini_batches(torch.zeros(12, 3), torch.zeros(12), 60, (0,)))
