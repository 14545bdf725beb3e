"""Many replicas on one device: what several processes compute together, computed by one.

A *replica* is a copy of the network with a process of its own.  In synchronous training ``N``
replicas share each mini-batch equally, every one normalizes its share with the statistics of that
share, their gradients are averaged, and all take the same step.  :class:`SynchronousReplicas` does
that one share after another; :func:`bnlib.imagenet.simulation.simulate` is a whole training run
with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.population import population_statistics

__all__ = [
    "SynchronousReplicas",
    "linear_rate",
    "population_over_replicas",
    "square_root_rate",
]


def linear_rate(rate: float, batch_size: int, base_batch_size: int = 32) -> float:
    """The learning rate in proportion to the mini-batch.

    One step with it goes as far as ``batch_size / base_batch_size`` small steps, if the gradient
    hardly changes meanwhile.

    Parameters
    ----------
    rate
        The learning rate that suits ``base_batch_size``.
    batch_size, base_batch_size
        Examples; 32 is the paper's mini-batch (section 4.2).

    Raises
    ------
    ValueError
        If a number is not positive.
    """
    return rate * _ratio(rate, batch_size, base_batch_size)


def square_root_rate(rate: float, batch_size: int, base_batch_size: int = 32) -> float:
    """The learning rate in proportion to the root of the mini-batch.

    With it the noise of one step keeps its size.

    Parameters
    ----------
    rate, batch_size, base_batch_size
        As in :func:`linear_rate`.

    Raises
    ------
    ValueError
        If a number is not positive.
    """
    return rate * math.sqrt(_ratio(rate, batch_size, base_batch_size))


def _ratio(rate: float, batch_size: int, base_batch_size: int) -> float:
    if not (rate > 0 and batch_size > 0 and base_batch_size > 0):
        raise ValueError(
            f"rate is {rate}, batch_size {batch_size} and base_batch_size {base_batch_size}; all "
            "three must be positive"
        )
    return batch_size / base_batch_size


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
    for layers in zip(model.modules(), *(each.modules() for each in found), strict=True):
        target, *replicas = layers
        if isinstance(target, _BatchNorm):
            for name, buffer in target.named_buffers(recurse=False):
                values = [replica.get_buffer(name) for replica in replicas]
                total = values[0].clone()
                if buffer.is_floating_point():
                    for value in values[1:]:
                        total += value
                    total /= len(values)
                buffer.copy_(total)
    return model
