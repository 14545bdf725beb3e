"""The experiment of section 4.1: a small sigmoid network on binary digits, with and without BN.

The paper states: 28x28 binary input, three fully connected hidden layers of 100 sigmoids, weights
from a small Gaussian, ten-way softmax with cross-entropy, 50,000 steps of 60 examples. It does
not state the learning rate, the optimizer, the Gaussian's deviation, the binarization threshold,
epsilon, the seeds, the statistics used for testing, or how the "typical" sigmoid was chosen. Here
these are fields of :class:`Figure1`; the optimizer is plain stochastic gradient descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnlib.mnist import digits
from bnlib.mnist.replicas import Replicas

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
class Replica:
    """What may differ between networks that are trained at once."""

    seed: int
    learning_rate: float
    weight_std: float


@dataclass(frozen=True)
class History:
    """What training left behind, for ``S`` replicas at ``T`` evaluations.

    Attributes
    ----------
    config
        The configuration.
    replicas
        The ``S`` replicas.
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
        step 0, and from the step at which a replica diverged.
    percentiles
        ``(S, T, 3, units)``: the :data:`PERCENTILES` of the input to each sigmoid of the last
        hidden layer, over the first 2,000 test images.
    inputs
        ``(S, T, 2000, units)`` in half precision, those inputs themselves; None unless kept.
    """

    config: Figure1
    replicas: tuple[Replica, ...]
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

    def typical_unit(self, replica: int = 0) -> int:
        """The unit of the last hidden layer whose drift is the median one of its layer.

        The paper shows "one typical sigmoid" and does not say how it was chosen; this is a
        choice that favors neither network.
        """
        drift = self.drift()[replica]
        return int(np.argsort(drift, kind="stable")[len(drift) // 2])


def train(
    config: Figure1,
    replicas: Sequence[Replica] | None = None,
    *,
    keep_inputs: bool = False,
    progress: bool = False,
    on_evaluation: Callable[[int, Replicas], None] | None = None,
) -> History:
    """Run the experiment for several networks at once.

    Parameters
    ----------
    config
        The experiment.
    replicas
        The networks; by default one for each of ``config.seeds`` with the configuration's
        learning rate and deviation. A sweep names its own.
    keep_inputs
        Also keep the sigmoid inputs themselves, for an animation.
    progress
        Show a progress bar.
    on_evaluation
        Called with the step and the frozen networks after each evaluation.

    Returns
    -------
    History
        Curves of every replica. The result depends on the configuration and the replica's seed;
        replicas do not influence one another.

    Raises
    ------
    bnlib.mnist.digits.DataError
        If the data set cannot be had.
    """
    data = digits.load(config.dataset)
    if replicas is None:
        replicas = [Replica(seed, config.learning_rate, config.weight_std) for seed in config.seeds]
    images = digits.binarize(data.train_images, config.threshold)
    test = digits.binarize(data.test_images, config.threshold)
    seeds = [replica.seed for replica in replicas]
    networks = Replicas(
        seeds,
        [replica.weight_std for replica in replicas],
        (images.shape[1], *config.hidden, _CLASSES),
        normalize=config.normalize,
        eps=config.eps,
    )
    rate = torch.tensor([replica.learning_rate for replica in replicas]).view(-1, 1, 1)
    batches = mini_batches(images, data.train_labels, config.batch_size, seeds)
    rows: list[dict[str, np.ndarray]] = []
    loss = torch.full((len(replicas),), torch.nan)

    evaluations = _evaluation_steps(config)
    done = 0
    with torch.no_grad():
        for until in _tracked(evaluations, progress):
            for _ in range(until - done):
                x, labels = next(batches)
                loss += networks.step(x, labels, rate)
            spent = max(until - done, 1)
            # Its own stream of mini-batches: looking must not change what is trained on next.
            sample = mini_batches(images, data.train_labels, config.batch_size, seeds, stream=1)
            networks.estimate_population(
                x for _, (x, _) in zip(range(config.population_batches), sample, strict=False)
            )
            row = _evaluate(networks, test, data.test_labels, config.batch_size, keep_inputs)
            rows.append({"train_loss": (loss / spent).numpy(), **row})
            if on_evaluation is not None:
                on_evaluation(until, networks)
            loss, done = torch.zeros(len(replicas)), until
    columns = {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
    return History(
        config=config,
        replicas=tuple(replicas),
        dataset={"name": data.name, "sha256": data.sha256},
        steps=np.array(evaluations),
        **columns,
    )


def mini_batches(
    images: Tensor, labels: Tensor, size: int, seeds: Sequence[int], *, stream: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless mini-batches, each seed in an order of its own, each epoch without replacement.

    Parameters
    ----------
    images, labels
        ``(N, inputs)`` float32 and ``(N,)`` int64.
    size
        Examples a mini-batch, at most ``N``. What remains of an epoch is left out.
    seeds
        One per replica.
    stream
        Another number gives an independent order for the same seeds.

    Yields
    ------
    x, labels
        ``(S, size, inputs)`` and ``(S, size)``. ``x`` is overwritten by the next one.
    """
    count = len(images)
    if size > count:
        raise ValueError(f"a mini-batch of {size} cannot be drawn from {count} examples")
    generators = [torch.Generator().manual_seed((stream + 1) * 1_000_003 + seed) for seed in seeds]
    x = torch.empty(len(seeds) * size, images.shape[1])
    while True:
        order = torch.stack([torch.randperm(count, generator=each) for each in generators])
        for start in range(0, count - size + 1, size):
            chosen = order[:, start : start + size]
            torch.index_select(images, 0, chosen.flatten(), out=x)
            yield x.view(len(seeds), size, -1), labels[chosen]


def _evaluation_steps(config: Figure1) -> list[int]:
    steps = list(range(0, config.steps, config.evaluate_every))
    return [*steps, config.steps]


def _tracked(items: Sequence[int], progress: bool) -> Any:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, unit="evaluation", mininterval=5)


def _evaluate(
    networks: Replicas, test: Tensor, labels: Tensor, batch_size: int, keep_inputs: bool
) -> dict[str, np.ndarray]:
    right = torch.zeros(networks.size)
    for x, y in zip(test.split(2000), labels.split(2000), strict=True):
        logits, _ = networks.infer(x)
        right += (logits.argmax(2) == y).sum(1)
    whole = len(test) - len(test) % batch_size
    right_batch = torch.zeros(networks.size)
    if networks.normalize:
        for x, y in zip(
            test[:whole].split(batch_size), labels[:whole].split(batch_size), strict=True
        ):
            logits, _ = networks.infer(x, batch_statistics=True)
            right_batch += (logits.argmax(2) == y).sum(1)
    _, inputs = networks.infer(test[:_MONITORED])
    ranks = torch.tensor(PERCENTILES) / 100
    percentiles = torch.quantile(inputs.mT.contiguous(), ranks, dim=2)  # (3, S, units)
    row = {
        "test_accuracy": (right / len(test)).numpy(),
        "test_accuracy_batch": (
            right_batch / whole if networks.normalize else right / len(test)
        ).numpy(),
        "percentiles": percentiles.transpose(0, 1).numpy(),
    }
    if keep_inputs:
        row["inputs"] = inputs.half().numpy()
    return row


def grid(
    learning_rates: Sequence[float], weight_stds: Sequence[float], seed: int = 0
) -> list[Replica]:
    """Every pair of learning rate and deviation, as replicas for :func:`train`."""
    return [Replica(seed, rate, std) for rate in learning_rates for std in weight_stds]


def both(config: Figure1, **options: Any) -> tuple[History, History]:
    """Train with and without batch normalization, all else equal: ``(with, without)``."""
    return (
        train(replace(config, normalize=True), **options),
        train(replace(config, normalize=False), **options),
    )
