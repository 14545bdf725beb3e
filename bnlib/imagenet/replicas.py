"""Many replicas on one device: what several processes compute together, computed by one.

A *replica* is a copy of the network with a process of its own. In synchronous training ``N``
replicas share each mini-batch equally, every one normalizes its share with the statistics of that
share, their gradients are averaged, and all take the same step.

With two replicas on CPUs the simulation has every bit of the real run. With more, gradients are
equal up to the order in which their ``N`` numbers are added: here from replica 0 upwards, among
processes from one that changes with the number's place in the message.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.state import State
from bnlib.imagenet.training.step import compute_loss, seed_dropout, update_weights
from bnlib.population import population_statistics

__all__ = ["Simulation", "SynchronousReplicas", "simulate"]


class SynchronousReplicas:
    """``replicas`` (``N``) replicas of a network, computed one after another.

    The model is trained in place: its parameters are those of every replica, its buffers those of
    replica 0.  ``buffers`` are each replica's after the last step, by name: running statistics that
    have all moved from those of replica 0, each by its own share of the mini-batch.

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
            Each replica's examples and labels: ``N`` pairs, all of one size.
        loss
            From the network, examples and labels to the mean loss over them.
        begin
            Called with a replica's number before its forward pass, as to seed its dropout.

        Returns
        -------
        torch.Tensor
            Each replica's loss, of shape ``(N,)``.
        """
        sizes = {len(labels) for _, labels in shares}
        if len(shares) != self.replicas or len(sizes) != 1:
            raise ValueError(
                f"{len(shares)} shares of {sorted(sizes)} examples; there must be "
                f"{self.replicas}, all of one size: cut the mini-batch with chunk({self.replicas})"
            )
        first, losses = self._buffers(), []
        mean: dict[nn.Parameter, Tensor] = {}
        for rank, (examples, labels) in enumerate(shares):
            self._set_buffers(first)
            if begin is not None:
                begin(rank)
            self.model.zero_grad(set_to_none=True)
            value = loss(self.model, examples, labels)
            torch.autograd.backward(value)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    part = parameter.grad * (1 / self.replicas)
                    mean[parameter] = mean[parameter] + part if parameter in mean else part
            self.buffers[rank] = self._buffers()
            losses.append(value.detach())
        for parameter in self.model.parameters():
            parameter.grad = mean.get(parameter)
        self._set_buffers(self.buffers[0])
        return torch.stack(losses)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(values[name])


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` returns.

    ``state`` has the model as trained, with the running statistics of replica 0; ``network`` is a
    copy for inference: averaged weights, population statistics over all replicas; ``losses`` are
    those before each step, of each replica on its share: float32 (steps, replicas), nats.
    """

    state: State
    network: nn.Module
    losses: Tensor


def simulate(recipe: Recipe, data: str | Path, replicas: int) -> Simulation:
    """:func:`bnlib.imagenet.training.loop.train` by so many processes, in one and on the CPU.

    The recipe's mini-batch is shared among the replicas.  That it cannot be divided equally, or
    that the recipe asks for what is not simulated, is a ``ValueError``.
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

    network = state.averaged()
    if recipe.normalization != "none":
        found = []
        for stream in streams:
            some = (images for _, images, _ in itertools.islice(stream, recipe.statistics_batches))
            found.append(population_statistics(copy.deepcopy(network), some))
        for name, buffer in network.named_buffers():
            first, *others = (each.get_buffer(name) for each in found)
            # added up from replica 0 on, as nothing else has every bit of two processes
            buffer.copy_(sum(others, first) / replicas if first.is_floating_point() else first)
    return Simulation(state, network, torch.stack(losses))
