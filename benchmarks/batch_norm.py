"""Batch normalization, forward and backward: bnlib's closed form against torch's native operator.

    python benchmarks/batch_norm.py                  # the CPU, as many threads as torch takes
    python benchmarks/batch_norm.py --device cuda    # a GPU
    python benchmarks/batch_norm.py --quick          # small batches, few repeats: for CI
    python benchmarks/batch_norm.py --compile        # also bnlib's batch_norm under torch.compile

Shapes are those of the paper's networks: activations of BN-Inception at its mini-batch of 32 (one
for each size of feature map) and a hidden layer of the MNIST network at its mini-batch of 60; and
two small feature maps.  The last rows are layers in training mode, with running statistics:
``BatchNorm`` against ``torch.nn.BatchNorm1d`` and ``BatchNorm2d``.

Each repeat times every contender once, in alternating order, so that whatever else the machine does
falls on all of them; a row gives the median of the ratios of these pairs, with their quartiles.
Small shapes get 20 times as many repeats.
The same run checks each contender against torch in float64: ``error`` is the largest deviation of
y and of the three gradients, as a share of the largest value of each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnlib import BatchNorm
from bnlib.functional import batch_norm, batch_norm_forward

SHAPES = [
    (32, 64, 112, 112),
    (32, 192, 56, 56),
    (32, 256, 28, 28),
    (32, 576, 14, 14),
    (32, 1024, 7, 7),
    (32, 64, 7, 7),
    (1, 3, 8, 8),
    (60, 100),
]
LAYERS = [(32, 256, 28, 28), (1, 3, 8, 8), (60, 100)]
LAYOUTS = {torch.contiguous_format: "", torch.channels_last: " channels-last"}
SMALL = 2**17  # values
LIMIT = 1e-4  # largest error accepted of bnlib
Transform = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)


def plain(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Algorithm 1 in ordinary tensor operations, differentiated by autograd."""
    return batch_norm_forward(x, gamma, beta).y


def step(transform: Transform, tensors: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    y = transform(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad_y)]


def clock(device: str) -> tuple[str, Callable[[], float]]:
    """Processor time where one thread does all the work: others on the machine do not count."""
    if torch.device(device).type == "cpu" and torch.get_num_threads() == 1:
        return "processor time", time.thread_time
    return "elapsed time", time.perf_counter


def seconds(transform: Transform, tensors: list[Tensor], grad_y: Tensor) -> float:
    synchronize = torch.cuda.synchronize if grad_y.is_cuda else lambda: None
    _, now = clock(grad_y.device.type)
    synchronize()
    start = now()
    step(transform, tensors, grad_y)
    synchronize()
    return now() - start


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)
    )


def make(
    shape: tuple[int, ...], memory_format: torch.memory_format, device: str
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, grad_y = random(*shape), random(*shape)
    if len(shape) == 4:
        x, grad_y = (t.contiguous(memory_format=memory_format) for t in (x, grad_y))
    tensors = [nn.Parameter(t.to(device)) for t in (x, random(shape[1]), random(shape[1]))]
    return tensors, grad_y.to(device)


def compare(
    contenders: dict[str, Transform], tensors: list[Tensor], grad_y: Tensor, repeats: int
) -> dict[str, tuple[list[float], float]]:
    """Times in seconds, pair by pair, and the error of each contender."""
    doubles = [t.detach().double().contiguous().requires_grad_() for t in tensors]
    exact = step(native, doubles, grad_y.double().contiguous())
    errors = {name: error(step(f, tensors, grad_y), exact) for name, f in contenders.items()}
    del doubles, exact
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(20 * repeats if grad_y.numel() <= SMALL else repeats):
        for name in sorted(contenders, reverse=repeat % 2 == 1):
            times[name].append(seconds(contenders[name], tensors, grad_y))
    return {name: (times[name], errors[name]) for name in contenders}


def layers(tensors: list[Tensor]) -> dict[str, Transform]:
    """torch's layer and ours, on the same parameters."""
    channels = tensors[0].shape[1]
    torchs = nn.BatchNorm1d if tensors[0].ndim == 2 else nn.BatchNorm2d
    transforms: dict[str, Transform] = {}
    for name, layer in (("native", torchs(channels)), ("bnlib", BatchNorm(channels))):
        layer.to(tensors[0].device)
        layer.weight, layer.bias = tensors[1:]
        transforms[name] = lambda x, *_, layer=layer: layer(x)
    return transforms


def report(label: str, outcome: dict[str, tuple[list[float], float]]) -> None:
    base, native_error = outcome["native"]
    cells = [f"{label:29s} {statistics.median(base) * 1e3:9.3f} ms {native_error:8.1e}"]
    for name, (times, deviation) in outcome.items():
        if name == "native":
            continue
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:6.2f} ({low:.2f}-{high:.2f}) {deviation:8.1e}")
        if name == "bnlib" and not deviation < LIMIT:
            raise SystemExit(f"{label}: bnlib deviates by {deviation:.1e} of the largest value")
    print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default cpu)")
    parser.add_argument("--repeats", type=int, help="pairs for each row (default 25; quick 5)")
    parser.add_argument("--quick", action="store_true", help="an eighth of each mini-batch")
    parser.add_argument("--compile", action="store_true", help="add a column for torch.compile")
    options = parser.parse_args()
    repeats = options.repeats or (5 if options.quick else 25)

    contenders: dict[str, Transform] = {"native": native, "bnlib": batch_norm, "plain": plain}
    if options.compile:
        contenders["compiled"] = torch.compile(batch_norm, fullgraph=True, dynamic=False)
    on_gpu = torch.device(options.device).type == "cuda"
    hardware = (
        torch.cuda.get_device_name(options.device)
        if on_gpu
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{hardware}; torch {torch.__version__}; float32; {clock(options.device)[0]}; "
        f"median (and quartiles) of n = {repeats} paired ratios, {20 * repeats} of small tensors"
    )
    print(
        f"{'forward + backward':29s} {'native':>12s}    error | "
        + " | ".join(f"{name + ' / native':>18s}    error" for name in list(contenders)[1:])
    )
    rows = [(shape, memory_format, "") for shape in SHAPES for memory_format in LAYOUTS]
    rows += [(shape, torch.contiguous_format, "layer ") for shape in LAYERS]
    for shape, memory_format, kind in rows:
        if len(shape) < 4 and memory_format is torch.channels_last:
            continue
        if options.quick and len(shape) == 4:
            shape = (max(1, shape[0] // 8), *shape[1:])
        tensors, grad_y = make(shape, memory_format, options.device)
        label = kind + "x".join(map(str, shape)) + LAYOUTS[memory_format]
        report(label, compare(layers(tensors) if kind else contenders, tensors, grad_y, repeats))


if __name__ == "__main__":
    main()
