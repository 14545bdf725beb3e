"""The price of whitening: forward and gradient of ``bnlib.whitening.whiten`` against batch_norm.

    python benchmarks/whitening.py [--examples 60] [--widest 1024] [--repeats 15] [--device cuda]
                                   [--quick]

For each dimension d, batch normalization and the whitening methods are timed in turn, in one
process. Printed are medians: milliseconds for batch normalization, how many times as long each
method takes, and at the end the exponents fitted to the last three dimensions. PCA is left out: it
has no gradient when m <= d, where eigenvalues of the covariance coincide.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bnlib import batch_norm
from bnlib.whitening import Method, whiten

NARROWEST = 16
METHODS: tuple[Method, ...] = ("zca", "cholesky")


def with_gradient(
    transform: Callable[[Tensor], Tensor], x: Tensor, g: Tensor
) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(transform(x), x, g)

    return run


def whitening(method: Method) -> Callable[[Tensor], Tensor]:
    return lambda x: whiten(x, 1e-3, method)


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of the least-squares line through the last three points, logarithms on both axes."""
    logs = [(math.log(d), math.log(t)) for d, t in zip(sizes[-3:], times[-3:], strict=True)]
    slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
    return slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=60, help="m, the size of the mini-batch")
    parser.add_argument("--widest", type=int, default=1024, help="largest dimension")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a few repeats, to see that it runs")
    arguments = parser.parse_args()
    device = arguments.device
    repeats, widest = (3, 256) if arguments.quick else (arguments.repeats, arguments.widest)
    m = arguments.examples
    hardware = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {hardware}, m = {m}, float32, n = {repeats} repeats")
    print(f"{'d':>6} {'batch_norm':>12}   ", *(f"{method:>16}" for method in METHODS))

    sizes = [d for d in (NARROWEST * 2**k for k in range(12)) if d <= widest]
    table: dict[str, list[float]] = {name: [] for name in ("batch_norm", *METHODS)}
    for d in sizes:
        x = torch.randn(m, d, device=device, requires_grad=True)
        g = torch.randn(m, d, device=device)
        runs: dict[str, Callable[[], object]] = {"batch_norm": with_gradient(batch_norm, x, g)}
        for method in METHODS:
            runs[method] = with_gradient(whitening(method), x, g)
        for run in runs.values():
            seconds(run, device)
        rounds = [
            {name: seconds(run, device) for name, run in runs.items()} for _ in range(repeats)
        ]
        for name, times in table.items():
            times.append(statistics.median(one[name] for one in rounds))
        ratios = {
            method: statistics.median(one[method] / one["batch_norm"] for one in rounds)
            for method in METHODS
        }
        print(
            f"{d:6d} {1e3 * table['batch_norm'][-1]:9.3f} ms   ",
            *(f"{ratio:14.2f} x" for ratio in ratios.values()),
        )
    print("exponents:", *(f"{k} {exponent(sizes, v):.2f}" for k, v in table.items()))


if __name__ == "__main__":
    main()
