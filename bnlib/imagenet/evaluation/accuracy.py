"""Accuracy on held-out images: one crop, ten or GoogLeNet's 144; one network or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bnlib.imagenet import checkpoint
from bnlib.imagenet.data.source import Source, check_classes
from bnlib.imagenet.evaluation.inference import predict
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe

__all__ = ["Accuracy", "count_correct", "evaluate", "evaluate_ensemble", "load_network"]


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
    """A network's accuracy on held-out images, which all processes of a group share.

    Parameters and errors are those of :func:`evaluate_ensemble`, with one network.
    """
    accuracies, _ = evaluate_ensemble(
        [network],
        source,
        size,
        crops,
        group=group,
        workers=workers,
        batch=batch,
        progress=progress,
    )
    return accuracies[0]


def evaluate_ensemble(
    networks: Sequence[nn.Module],
    source: Source,
    size: int,
    crops: int = 1,
    *,
    group: Processes,
    workers: int = 0,
    batch: int = 100,
    progress: bool = False,
) -> tuple[list[Accuracy], Accuracy]:
    """Accuracy of several networks, and of the arithmetic mean of their probabilities.

    Parameters
    ----------
    networks
        At least one, in evaluation mode, on the device of ``group``.
    source, size, crops, group, workers, batch, progress
        As in :func:`bnlib.imagenet.evaluation.inference.predict`.

    Returns
    -------
    tuple
        A list with the accuracy of each network, and that of the ensemble, over the images of all
        processes; the same in each.

    Raises
    ------
    ValueError
        If no image can be read, or as ``predict`` does.
    """
    counts = torch.zeros(len(networks) + 1, 4, dtype=torch.float64, device=group.device)
    for part in predict(
        networks,
        source,
        size,
        crops,
        group=group,
        workers=workers,
        batch=batch,
        progress=progress,
    ):
        mean = part.log_probabilities.logsumexp(0) - math.log(len(networks))
        for sums, logs in zip(counts, [*part.log_probabilities, mean], strict=True):
            sums += count_correct(logs, part.labels)
    if not group.sum(counts)[0, 2]:
        raise ValueError(f"none of the {len(source)} images of {source.location} can be read")
    *each, together = map(Accuracy.from_counts, counts)
    return each, together


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
