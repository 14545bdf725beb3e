"""The networks that are timed against each other, each in its way of running."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
from collections.abc import Callable, Iterator
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
    logits
        Of the first step, less their mean over the mini-batch.
    """

    def __init__(
        self, network: nn.Module, mode: str, images: Tensor, labels: Tensor, pool: Any = None
    ) -> None:
        device = self.device = images.device
        cuda = device.type == "cuda"
        forget()
        before = torch.cuda.memory_allocated() if cuda else 0
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
        with clock.beside(device) if "graph" in mode else contextlib.nullcontext():
            with in_kernels(self.network) if "fused" in mode else contextlib.nullcontext():
                self.first_loss = float(self._eager())
            self.logits = self.output.float().cpu()
            self.logits -= self.logits.mean(0)
            for _ in range(clock.WARM_UP):
                self._eager()
        self.step: Callable[[], object] = self._eager
        if cuda:
            self.optimizer.zero_grad(set_to_none=True)
            forget()
            torch.cuda.reset_peak_memory_stats()
        if "graph" in mode:
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
            output = self.network(self.images)
            loss = F.cross_entropy(output.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss, self.output = loss.detach(), output.detach()
        return self.loss


@contextlib.contextmanager
def in_kernels(network: nn.Module) -> Iterator[None]:
    """An error unless every fused pair of normalization and ReLU runs in our kernels meanwhile."""
    names: list[str] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        names.append(type(output.grad_fn).__name__)

    blocks = [m for m in network.modules() if type(m).__name__ == "_FusedConvNormAct"]
    hooks = [block.register_forward_hook(note) for block in blocks]
    yield
    for hook in hooks:
        hook.remove()
    if not blocks or any("NormReLU" not in name for name in names):
        raise RuntimeError(f"not all pairs run in the kernels: {sorted(set(names))}")


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


def check(ready: dict[tuple[str, str], Contender]) -> list[str]:
    """Take out those that compute something else than the port, and say so.

    In 16 bits the port itself is off by a third in its first logits, so that only a gross error
    shows here; :func:`check_fused` and the head of the script have the narrow tolerances.
    """
    reference, wrong = ready.get(("port", "eager")), []
    for (name, mode), contender in list(ready.items()):
        if reference is None or name not in ("port", "ours"):
            continue
        off = {"first logits": distance(contender.logits, reference.logits) / 0.8}
        for what in ("first_loss", "last_loss"):
            ours, theirs = getattr(contender, what), getattr(reference, what)
            off[what.replace("_", " ")] = abs(ours - theirs) / (0.05 * max(1.0, abs(theirs)))
        for what, share in off.items():
            if not share <= 1:  # NaN is no agreement
                wrong.append(
                    f"{name}, {mode}: left out: it computes something else than the port: its "
                    f"{what} are {share:.1f} times as far off as they may be"
                )
                print(f"  {wrong[-1]}")
                ready.pop((name, mode), None)
    return wrong


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def check_fused(network: nn.Module, size: int, device: torch.device, count: int = 4) -> list[str]:
    """What is wrong with the whole network in our kernels, in float32: nothing, one hopes.

    Its output, gradients and statistics must be as near to those in float64 as with torch's own
    operations, up to a factor of 10; compared are medians over the tensors of a kind.
    """
    images = torch.randn(count, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    weights = torch.randn(count, 1000, device=device)

    def results(fused: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        own = copy.deepcopy(network).to(device, dtype).to(memory_format=torch.channels_last).train()
        if fused:
            fuse_norm_relu(own)
        output = own(images.to(dtype))
        (output * weights).sum().backward()
        found = {f"{n}, its gradient": p.grad for n, p in own.named_parameters()}
        found |= {"output": output.detach(), **dict(own.named_buffers())}
        return {n: t.double() for n, t in found.items() if t is not None and t.is_floating_point()}

    wide = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        exact = results(False, torch.float64)
        plain, ours = results(False, torch.float32), results(True, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = wide
    wrong = []
    for kind in "output conv.weight norm.weight norm.bias running_mean running_var".split():
        names = [name for name in exact if kind in name]
        theirs, mine = (
            statistics.median(distance(found[name], exact[name]) for name in names)
            for found in (plain, ours)
        )
        print(f"  {kind}: off by {mine:.0e} in our kernels, by {theirs:.0e} in torch's, in float32")
        if not mine <= 10 * theirs + 1e-6:
            wrong.append(f"the network in our kernels is wrong: {kind} is off by {mine:.0e}")
            print(f"  {wrong[-1]}")
    return wrong


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
