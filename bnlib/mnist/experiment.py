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
    """Everything that determines the experiment; a ValueError names the field that cannot be."""

    normalize: bool = True  #: batch-normalize the input of every hidden sigmoid
    learning_rate: float = 0.1  #: of plain stochastic gradient descent; not in the paper
    weight_std: float = 0.1  #: standard deviation of the initial weights ("small" in the paper)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  #: one network each, its weights and mini-batches
    steps: int = 50_000  #: as in the paper
    batch_size: int = 60  #: as in the paper
    hidden: tuple[int, ...] = (100, 100, 100)  #: sigmoids of each layer, as in the paper
    threshold: float = 0.5  #: ink above this fraction of full intensity is 1; not in the paper
    eps: float = 1e-5  #: added to the variance; not in the paper
    dataset: str = "auto"  #: as in :func:`bnlib.mnist.digits.load`
    evaluate_every: int = 500  #: steps between evaluations, of which the first is before training
    population_batches: int = 50  #: mini-batches that Algorithm 2 averages over at an evaluation

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 2, "evaluate_every": 1, "population_batches": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
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
    """What training left behind, for ``S`` networks at ``T`` evaluations."""

    config: Figure1
    networks: tuple[Network, ...]  #: the ``S`` networks
    dataset: dict[str, str]  #: name and sha256 of the data
    steps: np.ndarray  #: (T,), steps taken at each evaluation, from 0
    #: (S, T), fraction of the test set classified correctly, with population statistics
    test_accuracy: np.ndarray
    #: (S, T), the same with the statistics of test mini-batches of ``batch_size``
    test_accuracy_batch: np.ndarray
    #: (S, T), mean cross-entropy in nats over the steps since the last evaluation; NaN at step 0,
    #: and from where a network diverged, which from there on answers at chance
    train_loss: np.ndarray
    #: (S, T, 3, units), the ``PERCENTILES`` of the input to each sigmoid of the last hidden layer,
    #: over the first 2,000 test images
    percentiles: np.ndarray
    #: (S, T, 2000, units), those inputs themselves in half precision; None unless kept
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
    """Run the experiment for several networks at once, which do not influence one another.

    Parameters
    ----------
    networks
        By default one for each of ``config.seeds`` with the configuration's learning rate and
        deviation. A sweep names its own.
    keep_inputs
        Also keep the sigmoid inputs themselves, for the panel of chapter 10.

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
    """The networks as a stack, each with weights drawn from its own seed, for ``inputs`` pixels.

    Each hidden layer computes ``sigmoid(BN(W u))``, or ``sigmoid(W u + b)``. Biases and beta start
    at 0, gamma at 1.
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
    if config.normalize:
        m = config.batch_size
        whole = len(test) - len(test) % m
        # First with the statistics of test mini-batches ...
        model.train()
        logits = [model(x.repeat(1, networks)).view(m, networks, -1) for x in test[:whole].split(m)]
        correct = torch.cat(logits).argmax(2) == labels[:whole, None]
        # ... then with those of Algorithm 2, which replace the running ones.
        population_statistics(
            model,
            (x.transpose(0, 1).flatten(1) for x, _ in islice(sample, config.population_batches)),
        )
    accuracy = stacks.accuracy(model, test, labels, networks)
    # All but the last sigmoid and the linear layer above it.
    inputs = stacks.predict(model[:-2], test[:_MONITORED], networks)
    ranks = torch.tensor(PERCENTILES) / 100
    percentiles = torch.quantile(inputs.mT.contiguous(), ranks, dim=2)  # (3, S, units)
    row = {
        "test_accuracy": accuracy.numpy(),
        "test_accuracy_batch": (correct.float().mean(0) if config.normalize else accuracy).numpy(),
        "percentiles": percentiles.transpose(0, 1).numpy(),
    }
    if keep_inputs:
        row["inputs"] = inputs.half().numpy()
    return row


def grid(
    learning_rates: Sequence[float], weight_stds: Sequence[float], seed: int = 0
) -> list[Network]:
    """Every pair of learning rate and deviation, as networks for :func:`train`."""
    return [Network(seed, rate, std) for rate in learning_rates for std in weight_stds]


def both(config: Figure1, **options: Any) -> tuple[History, History]:
    """Train with and without batch normalization, all else equal: ``(with, without)``."""
    normalized, plain = replace(config, normalize=True), replace(config, normalize=False)
    return train(normalized, **options), train(plain, **options)
