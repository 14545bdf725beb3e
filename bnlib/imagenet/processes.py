"""One process or many: what ``torchrun`` sets up, and the few collective operations needed."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Processes", "processes"]

T = TypeVar("T")


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
    patient
        The group of all processes whose timeout is long, for :meth:`barrier`.
    """

    rank: int
    world: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

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

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The greatest over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        if self.world == 1:
            return flag
        return bool(self.all_reduce_max(torch.tensor(int(flag), device=self.device)))

    def average_statistics(self, model: nn.Module) -> None:
        """Population statistics over the mini-batches of all processes, each with as many."""
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                assert layer.running_var is not None
                self.mean(layer.running_mean)
                self.mean(layer.running_var)

    def after_first(self, work: Callable[[], T]) -> T:
        """Do the same work in all processes, in the first one before the others."""
        if not self.first:
            self.barrier()
        result = work()
        if self.first:
            self.barrier()
        return result

    def barrier(self) -> None:
        """Wait for all processes, for up to twelve hours: the first may be unpacking archives."""
        if self.world > 1:
            dist.barrier(self.patient)


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
        If there is no such device.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}; it must be auto, cpu, cuda, cuda:0 or another device of torch"
        ) from error
    if place.type == "cuda":
        if (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs here; start "
                "at most one process for each"
            )
        torch.cuda.set_device(place)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
        assert isinstance(patient, dist.ProcessGroup)
        yield Processes(dist.get_rank(), world, place, patient)
    finally:
        dist.destroy_process_group()
