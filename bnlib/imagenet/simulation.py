"""The training of :mod:`bnlib.imagenet.training.loop` as several processes do it, computed by one.

With two replicas on CPUs the simulation has every bit of the real run.  With more, gradients are
equal up to the order in which their ``N`` numbers are added: here from replica 0 upwards, among
processes from one that changes with the number's place in the message.
"""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.scale import SynchronousReplicas, population_over_replicas
from bnlib.imagenet.training.state import weight_decay_on_weights
from bnlib.imagenet.training.step import follow, loss_of, seed_dropout

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` returns.

    Attributes
    ----------
    model
        The network as trained, with the running statistics of replica 0.
    average
        The same with averaged weights, or None if the recipe does not average.
    optimizer
        Its optimizer.
    network
        A copy for inference: averaged weights, population statistics over all replicas.
    losses
        float32 (steps, replicas), nats: before each step, of each replica on its share.
    """

    model: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    network: nn.Module
    losses: Tensor


def simulate(
    recipe: Recipe, data: str | Path, replicas: int, *, statistics_batches: int = 200
) -> Simulation:
    """Train on the CPU, in one process, as ``replicas`` processes would.

    Parameters
    ----------
    recipe
        What to train; its mini-batch is shared among the replicas.
    data
        Where the images are, for :func:`bnlib.imagenet.data.folders.open_source`.
    replicas
        How many.
    statistics_batches
        Training mini-batches that population statistics are taken over.

    Raises
    ------
    ValueError
        If the mini-batch cannot be divided equally.
    SourceError, DamagedImage
        If the images cannot be had, or one cannot be read.
    """
    source = open_source(data, "train")
    streams = [
        batches(source, recipe, start_step=0, rank=rank, world=replicas, workers=0)
        for rank in range(replicas)
    ]
    torch.manual_seed(recipe.seed)
    model: nn.Module = recipe.network().to(memory_format=torch.channels_last)
    average = AveragedModel(model) if recipe.polyak else None
    optimizer = torch.optim.SGD(
        weight_decay_on_weights(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
    )
    together = SynchronousReplicas(model, replicas)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images = images.to(memory_format=torch.channels_last)
        return loss_of(network(images), labels)[1]

    losses = []
    model.train()
    for step in range(recipe.steps):
        rate = recipe.learning_rate_at(step, streams[0].steps_per_epoch)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        shares = [next(stream)[1:] for stream in streams]
        losses.append(
            together.backward(shares, loss, functools.partial(seed_dropout, recipe, step))
        )
        optimizer.step()
        if average is not None:
            follow(average, model, recipe.polyak, step)

    network = copy.deepcopy(average.module if average is not None else model)
    if any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        first_ones = [itertools.islice(stream, statistics_batches) for stream in streams]
        population_over_replicas(network, [((x, y) for _, x, y in part) for part in first_ones])
    return Simulation(model, average, optimizer, network.eval(), torch.stack(losses))
