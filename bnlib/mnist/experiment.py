"""The experiment of section 4.1: a small sigmoid network on binary digits, with and without BN.

The paper states: 28x28 binary input, three fully connected hidden layers of 100 sigmoids, weights
from a small Gaussian, ten-way softmax with cross-entropy, 50,000 steps of 60 examples. It does
not state the learning rate, the optimizer, the Gaussian's deviation, the binarization threshold,
epsilon, the seeds, the statistics used for testing, or how the "typical" sigmoid was chosen. Here
these are fields of :class:`Figure1`; the optimizer is plain stochastic gradient descent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlib.mnist import digits, stacks
from bnlib.mnist.stacks import mini_batches
from bnlib.modules import BatchNorm
from bnlib.population import population_statistics

#: Percentiles of the last hidden layer's sigmoid inputs that a history keeps.
PERCENTILES = (15, 50, 85)
_MONITORED = 2000  # test images whose sigmoid inputs the percentiles are taken over
_CLASSES = 10


@dataclass(frozen=True)
class Figure1:
    """Everything that determines the experiment.

    Attributes
    ----------
    normalize
        Batch-normalize the input of every hidden sigmoid.
    learning_rate
        Of plain stochastic gradient descent on the mean cross-entropy (not in the paper).
    weight_std
        Standard deviation of the initial weights ("small" in the paper).
    seeds
        One network each; a seed fixes weights and mini-batches.
    steps
        50,000, as in the paper.
    batch_size
        60 examples, as in the paper.
    hidden
        Three layers of 100 sigmoids, as in the paper.
    threshold
        Ink above this fraction of full intensity is 1 (not in the paper).
    eps
        Added to the variance (not in the paper).
    dataset
        As in :func:`bnlib.mnist.digits.load`.
    evaluate_every
        Steps between evaluations; the network is also evaluated before the first step.
    population_batches
        Training mini-batches that Algorithm 2 averages over at each evaluation.
    """

    normalize: bool = True
    learning_rate: float = 0.1
    weight_std: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 50_000
    batch_size: int = 60
    hidden: tuple[int, ...] = (100, 100, 100)
    threshold: float = 0.5
    eps: float = 1e-5
    dataset: str = "auto"
    evaluate_every: int = 500
    population_batches: int = 50

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 2),
            ("evaluate_every", 1),
            ("population_batches", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_std", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.seeds or not self.hidden:
            raise ValueError(
                f"seeds and hidden must name at least one seed and one layer; got "
                f"seeds={self.seeds}, hidden={self.hidden}"
            )


@dataclass(frozen=True)
class Network:
    """What may differ between networks that are trained at once."""

    seed: int
    learning_rate: float
    weight_std: float


@dataclass(frozen=True)
class History:
    """What training left behind, for ``S`` networks at ``T`` evaluations.

    Attributes
    ----------
    config
        The configuration.
    networks
        The ``S`` networks.
    dataset
        Name and sha256 of the data: ``{"name": "MNIST", "sha256": ...}``.
    steps
        ``(T,)``: steps taken at each evaluation, from 0.
    test_accuracy
        ``(S, T)``: fraction of the test set classified correctly, with population statistics.
    test_accuracy_batch
        ``(S, T)``: the same with the statistics of test mini-batches of ``batch_size``.
    train_loss
        ``(S, T)``: mean cross-entropy in nats over the steps since the last evaluation; NaN at
        step 0, and from the step at which a network diverged; from there on it answers at chance.
    percentiles
        ``(S, T, 3, units)``: the ``PERCENTILES`` of the input to each sigmoid of the last
        hidden layer, over the first 2,000 test images.
    inputs
        ``(S, T, 2000, units)`` in half precision, those inputs themselves; None unless kept.
    """

    config: Figure1
    networks: tuple[Network, ...]
    dataset: dict[str, str]
    steps: np.ndarray
    test_accuracy: np.ndarray
    test_accuracy_batch: np.ndarray
    train_loss: np.ndarray
    percentiles: np.ndarray
    inputs: np.ndarray | None = None

    def drift(self) -> np.ndarray:
        """How far each unit's median input wanders, ``(S, units)``.

        The range (largest less smallest) of the median over the evaluations after the first
        tenth of training, in units of the sigmoid's input.
        """
        late = self.percentiles[:, self.steps >= 0.1 * self.steps[-1], 1]
        return late.max(axis=1) - late.min(axis=1)

    def typical_unit(self, network: int = 0) -> int:
        """The unit of the last hidden layer whose drift is the median one of its layer.

        The paper shows "one typical sigmoid" and does not say how it was chosen; this is a
        choice that favors neither network.
        """
        drift = self.drift()[network]
        return int(np.argsort(drift, kind="stable")[len(drift) // 2])


def train(
    config: Figure1,
    networks: Sequence[Network] | None = None,
    *,
    keep_inputs: bool = False,
    progress: bool = False,
) -> History:
    """Run the experiment for several networks at once.

    Parameters
    ----------
    config
        The experiment.
    networks
        The networks; by default one for each of ``config.seeds`` with the configuration's
        learning rate and deviation. A sweep names its own.
    keep_inputs
        Also keep the sigmoid inputs themselves, for an animation.
    progress
        Show a progress bar.

    Returns
    -------
    History
        Curves of every network. The result depends on the configuration and the network's seed;
        networks do not influence one another.

    Raises
    ------
    bnlib.mnist.digits.DataError
        If the data set cannot be had.
    """
    from tqdm import tqdm

    data = digits.load(config.dataset)
    if networks is None:
        networks = [Network(seed, config.learning_rate, config.weight_std) for seed in config.seeds]
    images = digits.binarize(data.train_images, config.threshold)
    test = digits.binarize(data.test_images, config.threshold)
    model = build(config, networks, inputs=images.shape[1])
    seeds = [network.seed for network in networks]
    rate = torch.tensor([network.learning_rate for network in networks])
    batches = mini_batches(images, data.train_labels, config.batch_size, seeds)

    rows: list[dict[str, np.ndarray]] = []
    evaluations = [*range(0, config.steps, config.evaluate_every), config.steps]
    loss, diverged = torch.full((len(networks),), torch.nan), torch.zeros(len(networks)).bool()
    done = 0
    for until in tqdm(evaluations, unit="evaluation", mininterval=5, disable=not progress):
        if until:
            loss = stacks.train(model, batches, steps=until - done, learning_rate=rate).mean(0)
            loss[diverged] = torch.nan
            diverged = loss.isnan()
            rate[diverged] = 0  # it stays at the zeros it was set to
            done = until
        # Its own stream of mini-batches: looking must not change what is trained on next.
        sample = mini_batches(images, data.train_labels, config.batch_size, seeds, stream=1)
        row = _evaluate(model, config, sample, test, data.test_labels, len(networks), keep_inputs)
        rows.append({"train_loss": loss.numpy(), **row})
    columns = {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
    return History(
        config=config,
        networks=tuple(networks),
        dataset={"name": data.name, "sha256": data.sha256},
        steps=np.array(evaluations),
        **columns,
    )


def build(config: Figure1, networks: Sequence[Network], *, inputs: int) -> nn.Sequential:
    """The networks as a stack, each with weights drawn from its own seed.

    Parameters
    ----------
    config
        The experiment, of which ``normalize``, ``hidden`` and ``eps`` count.
    networks
        Seed and weight deviation of each. Biases and beta start at 0, gamma at 1.
    inputs
        Pixels of an image.

    Returns
    -------
    torch.nn.Sequential
        Each hidden layer computes ``sigmoid(BN(W u))``, or ``sigmoid(W u + b)``.
    """

    def block(channels: int) -> list[nn.Module]:
        norm = [BatchNorm(channels, eps=config.eps)] if config.normalize else []
        return [*norm, nn.Sigmoid()]

    sizes = (inputs, *config.hidden, _CLASSES)
    with torch.random.fork_rng(devices=[]):  # every weight is drawn again below
        model = stacks.stacked_perceptron(len(networks), sizes, block, bias=not config.normalize)
    generators = [torch.Generator().manual_seed(network.seed) for network in networks]
    for layer in model:
        if isinstance(layer, stacks.StackedLinear):
            for weight, network, generator in zip(
                layer.weight.detach(), networks, generators, strict=True
            ):
                weight.normal_(std=network.weight_std, generator=generator)
    return model


@torch.no_grad()
def _evaluate(
    model: nn.Sequential,
    config: Figure1,
    sample: Iterator[tuple[Tensor, Tensor]],
    test: Tensor,
    labels: Tensor,
    networks: int,
    keep_inputs: bool,
) -> dict[str, np.ndarray]:
    """One row of the history; ``sample`` gives the mini-batches of Algorithm 2."""
    batch_accuracy = None
    if config.normalize:
        batch_accuracy = _accuracy_with_batch_statistics(
            model, test, labels, networks, config.batch_size
        )
        # Replaces the running statistics, which training and the line above have moved.
        population_statistics(
            model,
            (x.transpose(0, 1).flatten(1) for x, _ in islice(sample, config.population_batches)),
        )
    test_accuracy = stacks.accuracy(model, test, labels, networks).numpy()
    # All but the last sigmoid and the linear layer above it.
    inputs = stacks.predict(model[:-2], test[:_MONITORED], networks)
    ranks = torch.tensor(PERCENTILES) / 100
    percentiles = torch.quantile(inputs.mT.contiguous(), ranks, dim=2)  # (3, S, units)
    row = {
        "test_accuracy": test_accuracy,
        "test_accuracy_batch": test_accuracy if batch_accuracy is None else batch_accuracy,
        "percentiles": percentiles.transpose(0, 1).numpy(),
    }
    if keep_inputs:
        row["inputs"] = inputs.half().numpy()
    return row


def _accuracy_with_batch_statistics(
    model: nn.Sequential, test: Tensor, labels: Tensor, networks: int, batch_size: int
) -> np.ndarray:
    """Test accuracy where test mini-batches are normalized with their own statistics."""
    whole = len(test) - len(test) % batch_size
    model.train()
    correct = torch.zeros(networks)
    for x, y in zip(test[:whole].split(batch_size), labels[:whole].split(batch_size), strict=True):
        logits = model(x.repeat(1, networks)).view(batch_size, networks, -1)
        correct += (logits.argmax(2) == y[:, None]).sum(0)
    return (correct / whole).numpy()


def grid(
    learning_rates: Sequence[float], weight_stds: Sequence[float], seed: int = 0
) -> list[Network]:
    """Every pair of learning rate and deviation, as networks for :func:`train`."""
    return [Network(seed, rate, std) for rate in learning_rates for std in weight_stds]


def both(config: Figure1, **options: Any) -> tuple[History, History]:
    """Train with and without batch normalization, all else equal: ``(with, without)``."""
    return (
        train(replace(config, normalize=True), **options),
        train(replace(config, normalize=False), **options),
    )
