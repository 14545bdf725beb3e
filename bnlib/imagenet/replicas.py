"""Many replicas on one device: what several processes compute together, computed by one.

A *replica* is a copy of the network with a process of its own. In synchronous training ``N``
replicas share each mini-batch equally, every one normalizes its share with the statistics of that
share, their gradients are averaged, and all take the same step. :class:`SynchronousReplicas` does
that one share after another; :func:`simulate` is a whole run of
:func:`bnlib.imagenet.training.loop.train` with it.

With two replicas on CPUs the simulation has every bit of the real run. With more, gradients are
equal up to the order in which their ``N`` numbers are added: here from replica 0 upwards, among
processes from one that changes with the number's place in the message.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.state import State
from bnlib.imagenet.training.step import compute_loss, seed_dropout, update_weights
from bnlib.population import population_statistics

__all__ = ["Simulation", "SynchronousReplicas", "population_over_replicas", "simulate"]


class SynchronousReplicas:
    """``N`` replicas of a network, computed one after another.

    Parameters
    ----------
    model
        The network.  It is trained in place: its parameters are those of every replica, its
        buffers those of replica 0.
    replicas
        How many, ``N``.

    Attributes
    ----------
    buffers
        Each replica's buffers after the last step, by name: running statistics that have all moved
        from those of replica 0, each by its own share of the mini-batch.  Before the next step
        those of replica 0 replace the others'.

    Raises
    ------
    ValueError
        If ``replicas`` is less than 1.

    Notes
    -----
    This is what ``torch.nn.parallel.DistributedDataParallel`` does, as it is by default: it divides
    each gradient by ``N`` and adds them up over the processes, and sends the buffers of the first
    process to the others before every forward pass.
    """

    def __init__(self, model: nn.Module, replicas: int) -> None:
        if replicas < 1:
            raise ValueError(f"replicas is {replicas}; it must be at least 1")
        self.model, self.replicas = model, replicas
        self.buffers = [self._buffers() for _ in range(replicas)]

    def backward(
        self,
        shares: Sequence[tuple[Tensor, Tensor]],
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
        begin: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Leave the mean of the replicas' gradients in ``.grad``.

        Parameters
        ----------
        shares
            Each replica's examples and labels, ``N`` of them.  One share that holds the whole
            mini-batch, with ``replicas=1``, is what synchronized statistics compute.
        loss
            From the network, examples and labels to the mean loss over them.
        begin
            Called with a replica's number before its forward pass, as to seed its dropout.

        Returns
        -------
        torch.Tensor
            Each replica's loss, of shape ``(N,)``.

        Raises
        ------
        ValueError
            If there are not ``N`` shares of one size.
        """
        sizes = {len(labels) for _, labels in shares}
        if len(shares) != self.replicas or len(sizes) != 1:
            raise ValueError(
                f"{len(shares)} shares of {sorted(sizes)} examples; there must be "
                f"{self.replicas}, all of one size: cut the mini-batch with chunk({self.replicas})"
            )
        first = self._buffers()
        parameters = list(self.model.parameters())
        mean: list[Tensor | None] = [None] * len(parameters)
        losses = []
        for rank, (examples, labels) in enumerate(shares):
            self._set_buffers(first)
            if begin is not None:
                begin(rank)
            self.model.zero_grad(set_to_none=True)
            value = loss(self.model, examples, labels)
            torch.autograd.backward(value)
            for place, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    part, before = parameter.grad * (1 / self.replicas), mean[place]
                    mean[place] = part if before is None else before + part
            self.buffers[rank] = self._buffers()
            losses.append(value.detach())
        for parameter, gradient in zip(parameters, mean, strict=True):
            parameter.grad = gradient
        self._set_buffers(self.buffers[0])
        return torch.stack(losses)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(values[name])


def population_over_replicas(model: nn.Module, streams: Sequence[Iterable[Any]]) -> nn.Module:
    """Algorithm 2 shared among replicas: each over its own mini-batches, then averaged.

    Parameters
    ----------
    model
        The trained network; its running statistics are replaced.
    streams
        For each replica its mini-batches, equally many, as
        :func:`~bnlib.population.population_statistics` takes them.

    Returns
    -------
    torch.nn.Module
        ``model`` itself.

    Raises
    ------
    ValueError
        If there are no streams, and as :func:`~bnlib.population.population_statistics` does.
    """
    if not streams:
        raise ValueError("streams is empty; give one stream of mini-batches for each replica")
    found = [population_statistics(copy.deepcopy(model), stream) for stream in streams]
    for layer, *replicas in zip(model.modules(), *(each.modules() for each in found), strict=True):
        if isinstance(layer, _BatchNorm):
            layer.load_state_dict(replicas[0].state_dict())
            for name in ("running_mean", "running_var"):
                # added up from replica 0 on, as nothing else has every bit of two processes
                total = sum(replica.get_buffer(name) for replica in replicas)
                layer.get_buffer(name).copy_(total / len(replicas))
    return model


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` returns.

    Attributes
    ----------
    state
        The model as trained, with the running statistics of replica 0; the averaged weights; the
        optimizer.
    network
        A copy for inference: averaged weights, population statistics over all replicas.
    losses
        float32 (steps, replicas), nats: before each step, of each replica on its share.
    """

    state: State
    network: nn.Module
    losses: Tensor


def simulate(recipe: Recipe, data: str | Path, replicas: int) -> Simulation:
    """Train on the CPU, in one process, as ``replicas`` processes would.

    Parameters
    ----------
    recipe
        What to train; its mini-batch is shared among the replicas.
    data
        Where the images are, for :func:`bnlib.imagenet.data.folders.open_source`.
    replicas
        How many.

    Raises
    ------
    ValueError
        If the mini-batch cannot be divided equally, or the recipe asks for what is not simulated.
    SourceError, DamagedImage
        If the images cannot be had, or one cannot be read.
    """
    for name in ("accumulate", "sync_bn", "precision", "statistics"):
        value, simulated = getattr(recipe, name), getattr(Recipe, name)
        if value != simulated:
            raise ValueError(f"{name} is {value!r}; only {simulated!r} can be simulated")
    source = open_source(data, "train")
    streams = [
        batches(source, recipe, start_step=0, rank=rank, world=replicas, workers=0)
        for rank in range(replicas)
    ]
    state = State(recipe, source, Processes(0, 1, torch.device("cpu")))
    together = SynchronousReplicas(state.model, replicas)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return compute_loss(network(images.to(memory_format=torch.channels_last)), labels)

    losses = []
    state.model.train()
    for step in range(recipe.steps):
        shares = [next(stream)[1:] for stream in streams]
        begin = functools.partial(seed_dropout, recipe, step)
        losses.append(together.backward(shares, loss, begin))
        update_weights(state, streams[0].steps_per_epoch)

    network = copy.deepcopy(state.average.module if state.average is not None else state.model)
    if any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        some = [itertools.islice(stream, recipe.statistics_batches) for stream in streams]
        population_over_replicas(network, [((x, y) for _, x, y in part) for part in some])
    return Simulation(state, network.eval(), torch.stack(losses))
