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
from torch import Tensor

__all__ = ["Processes", "processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank`` from 0 of the ``world`` that train together, and its device.

    ``patient`` is the group of all processes whose timeout is long, for :meth:`barrier`.
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
        return self.sum(tensor).div_(self.world)

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

    ``device`` is "auto", "cpu", "cuda" or another one of torch; that there is none such is a
    ``ValueError``.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}; it must be auto, cpu, cuda, cuda:0 or another device of torch"
        ) from error
    if place.type == "cuda":
        if (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs here; "
                "start at most one process for each, or use --device cpu"
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
