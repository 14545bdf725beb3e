"""Evaluation during training: the network for inference, its accuracy, and ``network.pt``."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.loader import Batches
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.evaluation.accuracy import Accuracy, evaluate
from bnlib.imagenet.options import Options
from bnlib.imagenet.training.log import errors_logged
from bnlib.imagenet.training.state import Diverged, State
from bnlib.population import population_statistics
from bnlib.runs import write_atomically

__all__ = ["evaluate_held_out", "inference_network"]

_LOGGER = logging.getLogger(__name__)


def evaluate_held_out(
    state: State,
    stream: Callable[..., Batches],
    held_out: Source,
    out: Path,
    options: Options,
) -> Accuracy:
    """Accuracy of :func:`inference_network`, which is written to ``network.pt`` in ``out``."""
    network = inference_network(state, stream)
    accuracy = evaluate(
        network,
        held_out,
        state.recipe.image_size,
        group=state.group,
        workers=options.workers,
        batch=options.eval_batch,
    )
    if state.group.first:
        buffer = io.BytesIO()
        content = {"recipe": state.recipe.to_json(), "step": state.step, "classes": state.classes}
        torch.save({**content, "model": network.state_dict()}, buffer)
        with errors_logged("network.pt"):
            write_atomically(out / "network.pt", buffer.getbuffer())
    return accuracy


def inference_network(state: State, stream: Callable[..., Batches]) -> nn.Module:
    """A copy of the network with averaged weights, and the statistics that the recipe asks for.

    Those of the population are over the next mini-batches of training; ``stream`` gives this
    process's share of them from a ``start_step`` on.  If they are not finite in any process, that
    is :class:`~bnlib.imagenet.training.state.Diverged`.
    """
    recipe, group, network = state.recipe, state.group, state.averaged()
    if recipe.statistics == "population" and recipe.normalization != "none":
        loader, overflow = stream(start_step=state.step), False
        some = itertools.islice(loader, recipe.statistics_batches)
        try:
            population_statistics(network, (images for _, images, _ in some))
        except DamagedImage:
            raise
        except ValueError as error:  # what else it refuses, training has refused before
            _LOGGER.warning("%s", error)
            overflow = True
        if group.any_rank(overflow):
            raise Diverged(state.step)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            group.mean(buffer)
    return network
