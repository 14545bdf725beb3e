"""One process or many: what ``torchrun`` sets up, and the few collective operations needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes
    ----------
    rank
        Its number, from 0.
    world
        How many there are.
    device
        Where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def greatest(self, tensor: Tensor) -> Tensor:
        """The greatest over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any_soon(self, flag: bool, step: int) -> bool:
        """Whether the flag is up in any process; many processes ask each other every ten steps."""
        if self.world == 1:
            return flag
        if step % 10:
            return False
        return bool(self.greatest(torch.tensor(int(flag), device=self.device)))

    def average_statistics(self, model: nn.Module) -> None:
        """Population statistics over the mini-batches of all processes, each with as many."""
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                assert layer.running_var is not None
                self.mean(layer.running_mean)
                self.mean(layer.running_var)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, or this one alone.

    gloo connects processes on CPUs, NCCL those on GPUs.

    Parameters
    ----------
    device
        "auto", "cpu", "cuda" or another device of torch.

    Raises
    ------
    ValueError
        If a GPU is asked for and there is none.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{local}"
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()
