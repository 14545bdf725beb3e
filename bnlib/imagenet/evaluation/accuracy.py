"""Accuracy on held-out photographs: one crop, ten or GoogLeNet's 144; one network or several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnlib.imagenet import checkpoint
from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import DamagedImage, Encoded
from bnlib.imagenet.data.source import Source, check_classes
from bnlib.imagenet.evaluation.crops import cropped, views
from bnlib.imagenet.evaluation.ensembles import SMALLEST, arithmetic_mean
from bnlib.imagenet.recipes import Recipe

__all__ = ["Accuracy", "count_right", "ensemble", "load_network", "probabilities", "score"]


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


def _counts(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Sums over a mini-batch: first, among five, images, loss; float64 (4,)."""
    five = min(5, log_probabilities.shape[1])
    hits = log_probabilities.topk(five).indices == labels[:, None]
    loss = torch.nn.functional.nll_loss(log_probabilities, labels, reduction="sum")
    sums = [hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)), loss]
    return torch.stack([value.to(log_probabilities.device).double() for value in sums])


def score(counts: Tensor) -> Accuracy:
    """The accuracy that :func:`count_right` counted.

    Raises
    ------
    ValueError
        If there was no image.
    """
    first, among, n, loss = counts.tolist()
    if not n:
        raise ValueError("there is no readable image to evaluate on")
    return Accuracy(first / n, among / n, int(n), loss / n)


@torch.inference_mode()
def count_right(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """Counts of a network over mini-batches; processes can sum theirs before :func:`score`.

    Parameters
    ----------
    network
        In evaluation mode.
    batches
        Images and labels, on the device.
    device
        Where the network is.

    Returns
    -------
    torch.Tensor
        Right, right among five, images and summed loss, (4,).
    """
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in batches:
        images = images.to(memory_format=torch.channels_last)
        total += _counts(network(images).float().log_softmax(1), labels)
    return total


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


@torch.inference_mode()
def probabilities(
    network: nn.Module,
    source: Source,
    size: int,
    crops: int = 1,
    *,
    device: torch.device | str = "cpu",
    batch: int = 100,
    progress: bool = False,
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Class probabilities of every image: the mean over its crops.

    Parameters
    ----------
    network
        In evaluation mode, on the device.
    source
        The images.
    size
        Height and width of a crop, pixels.
    crops
        1, 10 or 144; see :mod:`bnlib.imagenet.evaluation.crops`.
    batch
        Crops that go through the network at once.

    Returns
    -------
    tuple
        Probabilities, float32 (n, classes); labels, int64 (n,); and the images that could not be
        read, from name to reason.
    """
    device = torch.device(device)
    together = max(1, batch // max(1, crops))  # images whose crops go through at once
    rows, labels, damaged = list[Tensor](), list[int](), dict[str, str]()
    indices = range(len(source))
    for first in tqdm(
        indices[::together], unit="img", unit_scale=together, disable=None if progress else True
    ):
        shown, weights = list[Tensor](), list[Tensor]()
        for index in indices[first : first + together]:
            try:
                example = source[index]
                encoded = Encoded(example.data, example.name)
                wanted = views(encoded.width, encoded.height, size, crops)
                encoded.size_with_shorter(max(view.shorter for view in wanted))  # refuses lines
                image = encoded.decode()
            except (DamagedImage, OSError) as error:
                damaged[source.name(index)] = getattr(error, "reason", str(error))
                continue
            counts = Counter(cropped(image, size, crops))  # a crop may occur more than once
            shown += counts
            weights.append(torch.tensor([list(counts.values())]) / crops)
            labels.append(example.label)
        if not shown:
            continue
        images = augment.normalize(torch.stack(shown).to(device).float())
        images = images.to(memory_format=torch.channels_last)
        parts = [network(part).float().softmax(1) for part in images.split(batch)]
        rows.append(torch.block_diag(*weights) @ torch.cat(parts).cpu())
        if max(labels) >= rows[0].shape[1]:
            raise ValueError(
                f"{source.location} has {len(source.classes)} classes, the network "
                f"{rows[0].shape[1]}; evaluate on the data set that it was trained on"
            )
    if not rows:
        raise ValueError(f"none of the {len(source)} images of {source.location} can be read")
    return torch.cat(rows), torch.tensor(labels), damaged


def ensemble(members: Sequence[Tensor], labels: Tensor) -> Accuracy:
    """Accuracy of the arithmetic mean of the networks' probabilities (section 4.2.3).

    Parameters
    ----------
    members
        For each network, probabilities (n, classes).
    labels
        int64 (n,).

    Raises
    ------
    ValueError
        If the networks differ in images or classes.
    """
    mean = arithmetic_mean(members)
    return score(_counts(mean.clamp_min(SMALLEST).log(), labels))
