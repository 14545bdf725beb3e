"""Batch normalization with ReLU alone, at the network's own shapes: our kernels against torch's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlib.inception.fused import norm_relu
from gpu import clock
from gpu.contenders import forget, quartiles
from gpu.floor import Machine

PASSES = 8  # over the map: x twice and y; x and dl/dy twice and dl/dx
COLD = 160 * 2**20  # bytes that the maps of one graph have together: several times a cache
FEW_ROWS = 8192  # up to which both forms of the kernels are tried
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def shapes(network: nn.Module, size: int) -> Counter[tuple[int, int]]:
    """(channels, height) of the normalized maps, and how many layers have each."""
    found: Counter[tuple[int, int]] = Counter()
    copied = copy.deepcopy(network).to("meta").train()
    for layer in copied.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, __, y: found.update([(y.shape[1], y.shape[2])]))
    with torch.no_grad():
        copied(torch.empty(2, 3, size, size, device="meta"))
    return found


def native(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return F.relu(norm(x), inplace=True)


def kernels(x: Tensor, norm: nn.BatchNorm2d, one_launch: bool | None = None) -> Tensor:
    y = norm_relu(x, norm, one_launch=one_launch)
    if "NormReLU" not in type(y.grad_fn).__name__:
        raise SystemExit("the kernels did not run: norm_relu fell back to torch")
    return y


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device) * 2 + 1
    return x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()


def check(shape: tuple[int, ...], device: torch.device, **options: Any) -> None:
    """Outputs, derivatives and statistics against float64; an error if they are off."""
    for dtype, tolerance in TOLERANCE.items():
        x, norm = example(shape, dtype, device), nn.BatchNorm2d(shape[1], device=device)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        grad = torch.randn(shape, device=device).to(x)
        exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
        native(wide, exact).backward(grad.double())
        y = kernels(x, norm, **options)
        with torch.no_grad():
            mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
            scale = exact.weight / (var + norm.eps).sqrt()
            before = (wide - mean[:, None, None]) * scale[:, None, None]
            before += exact.bias[:, None, None]
        y.backward(grad)
        decided = before.abs() > 1e-4  # elsewhere ReLU depends on the last digit
        pairs = {
            "y": (y, F.relu(before)),
            "dl/dx": (x.grad * decided, wide.grad * decided),
            "dl/dgamma": (norm.weight.grad, exact.weight.grad),
            "running_mean": (norm.running_mean, exact.running_mean),
            "running_var": (norm.running_var, exact.running_var),
        }
        for name, (found, wanted) in pairs.items():
            off = (
                (found.detach().double() - wanted.detach()).norm() / wanted.detach().norm()
            ).item()
            if not off <= tolerance * (10 if name == "dl/dgamma" else 1):
                raise SystemExit(
                    f"the kernels are wrong: {name} of {shape} in {dtype} is off by {off:.1e}; "
                    "nothing is reported"
                )


def round_trip(
    run: Callable[[Tensor, nn.BatchNorm2d], Tensor], shape: tuple[int, ...], device: torch.device
) -> Callable[[], object]:
    """Forward and backward over one map after another, so that none is in the cache, as a graph."""
    one = 2 * int(torch.Size(shape).numel())
    cases = []
    count = max(1, min(128, COLD // (2 * one))) if device.type == "cuda" else 1
    for _ in range(count):
        x = example(shape, torch.bfloat16, device)
        cases.append((x, torch.randn_like(x), nn.BatchNorm2d(shape[1], device=device)))

    def step() -> None:
        for x, grad, norm in cases:
            torch.autograd.grad(run(x, norm), (x, norm.weight, norm.bias), grad)

    clock.warm_up(step, device)
    replay = clock.captured(step, device)

    def each() -> object:
        return replay()

    each.cases = len(cases)  # type: ignore[attr-defined]
    return each


def measure(
    network: nn.Module, batch: int, size: int, device: torch.device, machine: Machine, rounds: int,
    late: Callable[[], bool],
) -> dict[str, list[float]]:  # fmt: skip
    """Microseconds of forward and backward pass for each shape; a column for each way."""
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for (channels, height), layers in sorted(shapes(network, size).items(), key=lambda s: -s[0][1]):
        if late():
            print("  the rest is left out, the time is up")
            break
        shape = (batch, channels, height, height)
        rows = batch * height * height
        ways: dict[str, Callable[[Tensor, nn.BatchNorm2d], Tensor]] = {
            "native_us": native,
            "fused_us": kernels,
        }
        if rows <= FEW_ROWS:
            ways["one_launch_us"] = lambda x, norm: kernels(x, norm, one_launch=True)
            ways["three_launches_us"] = lambda x, norm: kernels(x, norm, one_launch=False)
        for options in ({"one_launch": True}, {"one_launch": False}):
            if rows <= FEW_ROWS or not options["one_launch"]:
                check(shape, device, **options)
        trips = {name: round_trip(run, shape, device) for name, run in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in trips}
        for number in range(rounds):
            for name in list(trips) if number % 2 else list(trips)[::-1]:
                seconds = clock.elapsed(trips[name], 4, device) / trips[name].cases  # type: ignore[attr-defined]
                times[name].append(1e6 * seconds)
        medians = {name: quartiles(values)[1] for name, values in times.items()}
        moved = PASSES * 2 * batch * channels * height * height
        row = {
            "batch": batch, "channels": channels, "height": height, "layers": layers,
            "share_of_copy": moved / machine.bytes_per_s / (medians["fused_us"] / 1e6),
            "one_launch_us": float("nan"), "three_launches_us": float("nan"), **medians,
        }  # fmt: skip
        for name in COLUMNS:
            columns[name].append(row[name])
        del trips
        forget()
    return columns


COLUMNS = (
    "batch channels height layers native_us fused_us one_launch_us three_launches_us share_of_copy"
).split()


def show(columns: dict[str, list[float]], batch: int) -> None:
    """One line a shape, and the sums over the network's layers with the aims."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    rows = [row for row in rows if row["batch"] == batch]
    if not rows:
        return
    for row in rows:
        forms = f", one launch {row['one_launch_us']:.1f}, three {row['three_launches_us']:.1f}"
        print(
            f"  {row['channels']:4.0f} x {row['height']:3.0f}^2, {row['layers']:2.0f} layers: "
            f"ours {row['fused_us']:7.1f} us, torch {row['native_us']:7.1f} us, "
            f"{row['share_of_copy']:.0%} of a copy" + forms * (row["one_launch_us"] > 0)
        )
    ours, theirs, ideal = (
        sum(row["layers"] * row[name] * factor(row) for row in rows)
        for name, factor in (
            ("fused_us", lambda row: 1.0),
            ("native_us", lambda row: 1.0),
            ("fused_us", lambda row: row["share_of_copy"]),
        )
    )
    ahead = sum(row["fused_us"] < row["native_us"] for row in rows)
    print(
        f"  all layers: ours {ours / 1e3:.2f} ms, torch {theirs / 1e3:.2f} ms: "
        f"{theirs / ours:.2f} times as fast, ahead at {ahead} of {len(rows)} shapes"
    )
    verdicts = {
        f"{ideal / ours:.0%} of the bandwidth of a copy (aim: 85%)": ideal / ours >= 0.85,
        "ahead of torch over all layers": ours < theirs,
    }
    for what, reached in verdicts.items():
        print(f"  {'PASS' if reached else 'FAIL'}  normalization alone, batch {batch}: {what}")
