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
    """How often the right class is first, and among the first five.

    Attributes
    ----------
    top1
        Fraction of ``n`` whose most probable class is the right one.
    top5
        Fraction of ``n`` whose right class is among the five most probable.
    n
        Images.
    loss
        Mean cross-entropy, nats.
    """

    top1: float
    top5: float
    n: int
    loss: float

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
    """Sums over images, which can be added up over mini-batches and processes.

    Parameters
    ----------
    log_probabilities
        (n, classes).
    labels
        int64 (n,).

    Returns
    -------
    torch.Tensor
        Right, right among five, images and summed loss (nats), float64 (4,), for
        :meth:`Accuracy.from_counts`.
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
    progress: bool = False,
) -> Accuracy:
    """A network's accuracy on held-out images, which all processes of the group share.

    Parameters and errors are those of :func:`bnlib.imagenet.evaluation.inference.predict`, for one
    network; that there is no image to evaluate on is a ``ValueError``, too.
    """
    parts = predict(
        [network],
        source,
        size,
        crops,
        group=group,
        workers=workers,
        batch=batch,
        progress=progress,
    )
    return accuracies(parts, 1, group)[0]


def accuracies(predicted: Iterable[Predicted], networks: int, group: Processes) -> list[Accuracy]:
    """Accuracy of networks, and of their ensemble: the arithmetic mean of their probabilities.

    Parameters
    ----------
    predicted
        What the networks say about this process's share of the images
        (:func:`bnlib.imagenet.evaluation.inference.predict`).
    networks
        How many they are.
    group
        The processes over which images are counted.

    Returns
    -------
    list of Accuracy
        One a network, and last that of the ensemble; the same in every process.

    Raises
    ------
    ValueError
        If no process has an image that can be read.
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
        run's folder, which stands for its ``network.pt`` or, before there is one, its newest
        checkpoint.
    source
        The images that it shall be shown, if their labels are to be compared with those that it was
        trained on.

    Raises
    ------
    CheckpointError
        As :func:`bnlib.imagenet.checkpoint.load` does.
    SourceError
        If the images are of other classes.
    """
    path = Path(path)
    if (path / "network.pt").is_file():
        path = path / "network.pt"
    state = checkpoint.load(path)
    recipe = Recipe.from_json(state["recipe"])
    if source is not None and "classes" in state:
        check_classes(source, state["classes"], f"the training of {path}")
    network = recipe.network()
    weights = state["model"]
    if state.get("average"):
        weights = {k[len("module.") :]: v for k, v in state["average"].items() if "module." in k}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(
            f"the weights in {path} do not fit its own recipe: {error}"
        ) from error
    return network.eval(), recipe
