"""Accuracy on held-out images: one crop, ten or GoogLeNet's 144; one network or several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bnlib.imagenet import checkpoint
from bnlib.imagenet.data.source import Source, check_classes
from bnlib.imagenet.evaluation.inference import Predicted, predict
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe

__all__ = ["Accuracy", "accuracies", "count_correct", "evaluate", "load_network"]


@dataclass(frozen=True)
class Accuracy:
    """How often the right class is the most probable, or among the five most probable."""

    top1: float  #: fraction of n
    top5: float  #: fraction of n
    n: int  #: images
    loss: float  #: mean cross-entropy, nats

    @classmethod
    def from_counts(cls, counts: Tensor) -> Accuracy:
        """The accuracy that :func:`count_correct` counted, over at least one image."""
        first, among, n, loss = counts.tolist()
        return cls(first / n, among / n, int(n), loss / n)

    def interval(self, top: int = 1) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of ``top1`` or ``top5``, for images drawn at random."""
        p, z = (self.top1 if top == 1 else self.top5), 1.959964
        middle = (p + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z / (1 + z * z / self.n) * math.sqrt(p * (1 - p) / self.n + (z / (2 * self.n)) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        parts = []
        for top, value in ((1, self.top1), (5, self.top5)):
            low, high = self.interval(top)
            parts.append(f"top-{top} {value:.2%} (95 % interval {low:.2%} to {high:.2%})")
        return f"{', '.join(parts)}, cross-entropy {self.loss:.3f} nats, {self.n} images"


def count_correct(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """From (n, classes) and int64 (n,) to float64 (4,), for :meth:`Accuracy.from_counts`.

    Images that are right, right among five, all images, and the summed loss in nats, which can be
    added up over mini-batches and processes.
    """
    five = min(5, log_probabilities.shape[1])
    hits = log_probabilities.topk(five).indices == labels[:, None]
    loss = torch.nn.functional.nll_loss(log_probabilities, labels, reduction="sum")
    sums = [hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)), loss]
    return torch.stack([value.to(log_probabilities.device).double() for value in sums])


def evaluate(
    network: nn.Module,
    source: Source,
    size: int,
    crops: int = 1,
    *,
    group: Processes,
    workers: int = 0,
    batch: int = 100,
) -> Accuracy:
    """A network's accuracy, by :func:`bnlib.imagenet.evaluation.inference.predict`."""
    parts = predict([network], source, size, crops, group=group, workers=workers, batch=batch)
    return accuracies(parts, 1, group)[0]


def accuracies(predicted: Iterable[Predicted], networks: int, group: Processes) -> list[Accuracy]:
    """Accuracy of each of the networks, and last of the arithmetic mean of their probabilities.

    Images are counted over all processes of the group, so that each has the same result; that none
    of them has an image that can be read is a ``ValueError``.
    """
    total = torch.zeros(networks + 1, 4, dtype=torch.float64, device=group.device)
    for part in predicted:
        mean = part.log_probabilities.logsumexp(0, keepdim=True) - math.log(networks)
        for sums, logs in zip(total, [*part.log_probabilities, *mean], strict=True):
            sums += count_correct(logs, part.labels)
    if not group.sum(total)[0, 2]:
        raise ValueError("there is no image that can be read; the log says what is wrong with each")
    return [Accuracy.from_counts(counts) for counts in total]


def load_network(path: str | Path, source: Source | None = None) -> tuple[nn.Module, Recipe]:
    """A trained network, ready for inference, and its recipe.

    Parameters
    ----------
    path
        ``network.pt`` of a run, which has the weights and statistics of the last evaluation; a
        checkpoint (averaged weights where there are some, moving averages as statistics); or the
        run's folder: its ``network.pt`` or, before there is one, its newest checkpoint.
    source
        Images that it shall be shown; other classes than those of its training are a
        ``SourceError``.
    """
    path = Path(path)
    if (path / "network.pt").is_file():
        path = path / "network.pt"
    state = checkpoint.load(path)
    recipe = Recipe.from_json(state["recipe"])
    if source is not None and "classes" in state:
        check_classes(source, state["classes"], f"the training of {path}")
    network = recipe.network()
    try:
        network.load_state_dict(state.get("average") or state["model"])
    except RuntimeError as error:
        raise checkpoint.CheckpointError(
            f"the weights in {path} do not fit its own recipe: {error}"
        ) from error
    return network.eval(), recipe
