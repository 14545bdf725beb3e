"""Networks side by side in one: each must be what it would be alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnlib import BatchNorm
from bnlib.mnist import mini_batches
from bnlib.mnist.stacks import StackedLinear, accuracy, predict, stacked_perceptron, train

SIZES = (6, 5, 4, 3)


def block(channels: int) -> list[nn.Module]:
    return [BatchNorm(channels), nn.Tanh()]


def alone(stack: nn.Sequential, networks: int, index: int) -> nn.Sequential:
    """One network of a stack, out of torch's own layers, with copies of its parameters."""
    layers: list[nn.Module] = []
    for module in stack:
        if isinstance(module, StackedLinear):
            _, inputs, outputs = module.weight.shape
            layer = nn.Linear(inputs, outputs, bias=module.bias is not None)
            layer.weight.data = module.weight[index].detach().T.clone()
            if module.bias is not None:
                layer.bias.data = module.bias.detach().view(networks, -1)[index].clone()
            layers.append(layer)
        elif isinstance(module, BatchNorm):
            layers.append(nn.BatchNorm1d(module.num_features // networks))
        else:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def drawn(networks: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(networks, 16, SIZES[0]), torch.randint(SIZES[-1], (networks, 16)))
        for _ in range(steps)
    ]


def test_every_network_trains_as_it_would_alone() -> None:
    torch.manual_seed(0)
    stack = stacked_perceptron(3, SIZES, block)
    singles = [alone(stack, 3, index) for index in range(3)]
    batches, rates = drawn(3, 12), (0.1, 0.5, 1.0)
    losses = train(stack, iter(batches), steps=12, learning_rate=rates)
    test, answers = torch.randn(40, SIZES[0]), torch.randint(SIZES[-1], (40,))
    logits = predict(stack, test, 3)
    shares = accuracy(stack, test, answers, 3)
    for index, (single, rate) in enumerate(zip(singles, rates, strict=True)):
        optimizer = torch.optim.SGD(single.parameters(), lr=rate)
        for step, (x, labels) in enumerate(batches):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(single(x[index]), labels[index])
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[step, index], loss.detach(), rtol=1e-3, atol=1e-4)
        single.eval()
        with torch.no_grad():
            expected = single(test)
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=1e-3)
        assert shares[index] == pytest.approx((expected.argmax(1) == answers).float().mean())


def test_a_diverged_network_answers_at_chance_and_leaves_the_others_alone() -> None:
    torch.manual_seed(1)
    stack = stacked_perceptron(2, SIZES, lambda channels: [nn.ReLU()])
    losses = train(stack, iter(drawn(2, 8)), steps=8, learning_rate=(1e30, 0.01))
    assert losses[-1, 0].isnan()
    assert losses[:, 1].isfinite().all()
    logits = predict(stack, torch.randn(5, SIZES[0]), 2)
    assert (logits[0] == 0).all()
    assert (logits[1] != 0).any()


def test_predicting_leaves_the_mode_as_it_was() -> None:
    stack = stacked_perceptron(2, SIZES, block)
    for mode in (True, False):
        stack.train(mode)
        predict(stack, torch.randn(5, SIZES[0]), 2)
        assert stack.training is mode


def test_sizes_without_a_hidden_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one hidden layer.*\(6, 3\)"):
        stacked_perceptron(2, (6, 3), block)


def test_a_layer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 2, 3, 0"):
        StackedLinear(2, 3, 0)


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
