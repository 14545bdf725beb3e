"""Timing on a device: events, CUDA graphs, and what the device can do at best."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu.floor import Machine

WARM_UP = 3  # steps before anything is timed or captured: plans, momenta and kernels are made
AWAKE = 0.5  # seconds of work after which a device that idled has its full clock


def elapsed(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds for each of ``count`` calls."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / count


@contextlib.contextmanager
def beside(device: torch.device) -> Any:
    """A stream of its own, where everything happens that a graph shall be captured of later."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(
    run: Callable[[], object], device: torch.device, pool: Any = None
) -> Callable[[], object]:
    """``run`` as a CUDA graph, which starts all its kernels at once; on the CPU ``run`` itself.

    ``run`` must have run :func:`beside` before, and only there.  Graphs that never run at the same
    time may share the memory of ``pool``.
    """
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # what is freed while a graph is captured can spoil it
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def kernel_seconds(run: Callable[[], object]) -> float:
    """Seconds that the device's kernels take in one call, without the gaps between them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    # calls on the CPU have the time of what they start, too
    kernels = [event for event in record.events() if event.device_type == DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in kernels if not e.is_user_annotation) / 1e6


def ceilings(device: torch.device, small: bool = False) -> Machine:
    """The rate of a large bf16 matrix product on random numbers, and the bandwidth of a copy."""
    side, size = (256, 2**20) if small else (8192, 2**32)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    product = fastest_half(lambda: torch.mm(left, right), device)
    copying = fastest_half(lambda: target.copy_(source), device)
    return Machine(2 * size / copying, 2 * side**3 / product)


def fastest_half(run: Callable[[], Tensor], device: torch.device, repeats: int = 12) -> float:
    """The median of the faster half: a ceiling is what the device reaches, not its average."""
    run()
    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - start < AWAKE:
        elapsed(run, 10, device)
    times = sorted(elapsed(run, 1, device) for _ in range(repeats))
    return times[repeats // 4]
