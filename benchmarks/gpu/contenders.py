"""The networks that are timed against each other, each in its way of running."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlib.inception.fused import fuse_norm_relu
from gpu import clock

# network, mode: in the order in which they are made, so that what may fail or take long comes last
ALL = (
    ("port", "eager"),
    ("ours", "eager"),
    ("resnet50", "eager"),
    ("googlenet", "eager"),
    ("port", "graph"),
    ("ours", "graph"),
    ("ours", "fused"),
    ("ours", "fused, graph"),
    ("ours", "compiled"),
    ("ours", "compiled, graph"),
)


class Contender:
    """A network with its optimizer, and what one step of it is.

    Attributes
    ----------
    peak
        Bytes that it takes at most: parameters, optimizer and one step.
    step
        One training step.
    loss
        Of the last step; on the device.
    """

    def __init__(
        self, network: nn.Module, mode: str, images: Tensor, labels: Tensor, pool: Any = None
    ) -> None:
        device = self.device = images.device
        cuda = device.type == "cuda"
        if cuda:
            before = torch.cuda.memory_allocated()
        self.network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)
        self.network.train()
        if "fused" in mode:
            fuse_norm_relu(self.network)
        if "compiled" in mode:
            # without a GPU only what the compiler reads is tried, not what it writes
            self.network.compile(dynamic=False, backend="inductor" if cuda else "eager")
        # a rate on the device can change between replays of a graph; only there is it taken so
        rate: Any = torch.tensor(0.01, device=device) if cuda else 0.01
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=rate, momentum=0.9, weight_decay=4e-5, fused=cuda
        )
        self.images, self.labels, self.loss = images, labels, images.new_zeros(())
        # a graph must not keep 16-bit weights of an earlier step
        self.cache = "graph" not in mode
        self.first_loss = float(self._eager())
        clock.warm_up(self._eager, device)
        self.step: Callable[[], object] = self._eager
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if "graph" in mode:
            self.optimizer.zero_grad(set_to_none=True)
            self.step = clock.captured(self._eager, device, pool)
        self.step()
        self.peak = 0
        if cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - before
        self.last_loss = float(self.loss)

    def _eager(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.cache):
            loss = F.cross_entropy(self.network(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()
        return self.loss


def prepare(
    networks: dict[str, nn.Module], wanted: list[tuple[str, str]], images: Tensor, labels: Tensor,
    late: Callable[[], bool],
) -> dict[tuple[str, str], Contender]:  # fmt: skip
    """Those that can run here; of the others it is said why not."""
    ready: dict[tuple[str, str], Contender] = {}
    # what one graph leaves behind serves the next; at 512 images not all would fit side by side
    pool = torch.cuda.graph_pool_handle() if images.device.type == "cuda" else None
    for name, mode in wanted:
        if late():
            print(f"  {name}, {mode}: left out, the time is up")
            continue
        reason = None
        try:
            ready[name, mode] = Contender(networks[name], mode, images, labels, pool)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # one contender less is better than none
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if reason is not None:  # outside the handler, which would keep the tensors
            print(f"  {name}, {mode}: left out: {reason}")
            forget()
    return ready


def forget() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_losses(ready: dict[tuple[str, str], Contender]) -> None:
    """All ways of running the same weights must lose the same, up to bf16; else nothing is told."""
    reference = ready.get(("port", "eager"))
    for (name, mode), contender in ready.items():
        if reference is None or name not in ("port", "ours"):
            continue
        for what in ("first_loss", "last_loss"):
            ours, theirs = getattr(contender, what), getattr(reference, what)
            if not abs(ours - theirs) <= 0.05 * max(1.0, abs(theirs)):  # NaN is no agreement
                raise SystemExit(
                    f"{name}, {mode} computes something else: its {what.replace('_', ' ')} is "
                    f"{ours:.3f}, the port's {theirs:.3f}; nothing is reported"
                )


def race(
    ready: dict[tuple[str, str], Contender], device: torch.device, rounds: int, least: float
) -> dict[tuple[str, str], list[float]]:
    """Seconds a step, ``rounds`` times each, in alternating order; ``least`` seconds at a time."""
    counts = {}
    for key in list(ready):
        try:
            ready[key].step()
            counts[key] = max(1, round(least / clock.elapsed(ready[key].step, 1, device)))
        except torch.OutOfMemoryError:  # alone there was room, beside the others there is not
            print(f"  {', '.join(key)}: left out: out of memory beside the others")
            del ready[key]
            forget()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    for number in range(rounds):
        for key in list(ready) if number % 2 else list(ready)[::-1]:
            times[key].append(clock.elapsed(ready[key].step, counts[key], device))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
