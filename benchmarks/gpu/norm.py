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
LEAST = 5  # of them if what is read again were still in the cache
COLD = 160 * 2**20  # bytes that the maps of one graph have together: several times a cache
FEW_ROWS = 8192  # up to which both forms of the kernels are tried
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
OF_SUMS = 1e-4  # over the map, in float32 for both


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
        raise RuntimeError("the kernels did not run: norm_relu fell back to torch")
    return y


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device) * 2 + 1
    return x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()


def check(shape: tuple[int, ...], device: torch.device, **options: Any) -> list[str]:
    """What is wrong with outputs, derivatives and statistics, against float64: nothing, one hopes.

    Where ReLU depends on the last digit, no gradient comes in: each such place that float32 decides
    otherwise would change the sums by more than all rounding.
    """
    wrong = []
    for dtype, tolerance in TOLERANCE.items():
        x, norm = example(shape, dtype, device), nn.BatchNorm2d(shape[1], device=device)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
        with torch.no_grad():
            before = copy.deepcopy(exact)(wide)
        grad = torch.randn_like(x) * (before.abs() > 1e-4)
        native(wide, exact).backward(grad.double())
        y = kernels(x, norm, **options)
        y.backward(grad)
        pairs = {
            "y": (y.detach(), F.relu(before), tolerance),
            "dl/dx": (x.grad, wide.grad, tolerance),
            "dl/dgamma": (norm.weight.grad, exact.weight.grad, OF_SUMS),
            "dl/dbeta": (norm.bias.grad, exact.bias.grad, OF_SUMS),
            "running_mean": (norm.running_mean, exact.running_mean, OF_SUMS),
            "running_var": (norm.running_var, exact.running_var, OF_SUMS),
        }
        for name, (found, wanted, limit) in pairs.items():
            off = float((found.double() - wanted).norm() / wanted.norm())
            if not off <= limit:
                wrong.append(f"the kernels are wrong: {name} of {shape}, {dtype}: off by {off:.1e}")
                print(f"  {wrong[-1]}")
    return wrong


def round_trip(
    run: Callable[[Tensor, nn.BatchNorm2d], Tensor], shape: tuple[int, ...], device: torch.device
) -> Callable[[], object]:
    """Forward over one map after another, then backward, as a graph; all begin out of the cache."""
    one = 2 * int(torch.Size(shape).numel())
    cases = []
    count = max(1, min(128, COLD // (2 * one))) if device.type == "cuda" else 1
    for _ in range(count):
        x = example(shape, torch.bfloat16, device)
        cases.append((x, torch.randn_like(x), nn.BatchNorm2d(shape[1], device=device)))

    def step() -> None:
        outputs = [run(x, norm) for x, _, norm in cases]
        for y, (x, grad, norm) in zip(outputs, cases, strict=True):
            torch.autograd.grad(y, (x, norm.weight, norm.bias), grad)

    with clock.beside(device):
        for _ in range(clock.WARM_UP if device.type == "cuda" else 1):
            step()
    replay = clock.captured(step, device)

    def each() -> object:
        return replay()

    each.cases = len(cases)  # type: ignore[attr-defined]
    return each


def measure(
    network: nn.Module, batch: int, size: int, device: torch.device, machine: Machine, rounds: int,
    late: Callable[[], bool], wrong: list[str],
) -> dict[str, list[float]]:  # fmt: skip
    """Microseconds of forward and backward pass for each shape; a column for each way.

    A shape at which the kernels are wrong is added to ``wrong`` and left out.
    """
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
        forms = [True, False] if rows <= FEW_ROWS else [False]
        found = [line for form in forms for line in check(shape, device, one_launch=form)]
        forget()
        if found:
            wrong += found
            continue
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
            f"{row['share_of_copy']:.0%} of a copy's bandwidth" + forms * (row["one_launch_us"] > 0)
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
    share = ideal / ours
    verdicts = {
        f"{share:.0%} of the bandwidth of a copy (aim: 85%), {LEAST / PASSES * share:.0%} if "
        "second readings cost nothing": share >= 0.85,
        "ahead of torch over all layers": ours < theirs,
    }
    for what, reached in verdicts.items():
        print(f"  {'PASS' if reached else 'FAIL'}  normalization alone, batch {batch}: {what}")
