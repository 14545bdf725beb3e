"""Evaluation during training: the network for inference, its accuracy, and ``network.pt``."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    """Accuracy of :func:`inference_network` on held-out images; writes it to ``network.pt``.

    The state of training is left as it was.
    """
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

    Parameters
    ----------
    state
        Of the run.
    stream
        From ``start_step`` to this process's share of the training mini-batches from there on;
        population statistics are taken over the next ones of training.

    Raises
    ------
    Diverged
        If the statistics of the population are not finite in any process.
    """
    recipe, group = state.recipe, state.group
    network = copy.deepcopy(state.average.module if state.average is not None else state.model)
    network.eval()
    if not any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        return network
    if recipe.statistics == "population":
        loader, overflow = stream(start_step=state.step), False
        try:
            some = (next(loader)[1] for _ in range(recipe.statistics_batches))
            population_statistics(network, some)
        except DamagedImage:
            raise
        except ValueError as error:  # what else it refuses, training has refused before
            _LOGGER.warning("%s", error)
            overflow = True
        if group.any_rank(overflow):
            raise Diverged(state.step)
    group.average_statistics(network)
    return network
