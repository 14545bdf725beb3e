"""One training step of the Figure 1 experiment, per network: ours against the plain loop.

    python benchmarks/mnist_step.py [--seeds 10] [--repeats 40] [--quick]

Three things are timed in turn, in one process, over mini-batches of MNIST-shaped binary
input (60 x 784, three hidden layers of 100):

* ``plain``: the loop a user would write for one network: nn.Linear, nn.BatchNorm1d, nn.Sigmoid,
  cross_entropy, backward(), torch.optim.SGD;
* ``ours``: ``bnlib.mnist.replicas`` for all seeds at once;
* ``matmul``: the bare matrix products of ours, written over preallocated memory and nothing else.

Fetching the mini-batch counts for ``plain`` and ``ours``. Printed are medians of the ratios of
neighboring repeats. Before timing, both are run side by side and their losses and weights compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from bnlib.mnist.replicas import Replicas

BATCH, SIZES, STEPS = 60, (784, 100, 100, 100, 10), 10


def plain_network(replicas: Replicas, index: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in replicas.hidden:
        linear = nn.Linear(*layer.weight.shape[1:], bias=not replicas.normalize)
        linear.weight.data = layer.weight[index].T.clone()
        layers.append(linear)
        if replicas.normalize:
            layers.append(nn.BatchNorm1d(SIZES[1]))
        else:
            linear.bias.data.zero_()
        layers.append(nn.Sigmoid())
    top = nn.Linear(*SIZES[-2:])
    top.weight.data = replicas.top_weight[index].T.clone()
    top.bias.data.zero_()
    return nn.Sequential(*layers, top)


def plain_loop(
    network: nn.Sequential, images: Tensor, labels: Tensor, order: Tensor, rate: float
) -> Callable[[], float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)

    def run() -> float:
        for chosen in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def batched_loop(
    replicas: Replicas, images: Tensor, labels: Tensor, order: Tensor, rate: Tensor
) -> Callable[[], Tensor]:
    x = torch.empty(replicas.size * BATCH, SIZES[0])

    def run() -> Tensor:
        for chosen in order:
            flat = chosen.flatten()
            torch.index_select(images, 0, flat, out=x)
            loss = replicas.step(
                x.view(replicas.size, BATCH, -1), labels[flat].view(-1, BATCH), rate
            )
        return loss

    return run


def bare_products(size: int) -> Callable[[], None]:
    shapes = list(pairwise(SIZES))
    x = [torch.randn(size, BATCH, inputs) for inputs, _ in shapes]
    weight = [torch.randn(size, *shape) for shape in shapes]
    grad = [torch.randn(size, BATCH, units) for _, units in shapes]
    out = [torch.empty_like(each) for each in grad]
    below = [torch.empty_like(each) for each in x]
    step = [torch.empty_like(each) for each in weight]

    def run() -> None:
        for _ in range(STEPS):
            for i in range(len(shapes)):
                torch.bmm(x[i], weight[i], out=out[i])
                torch.bmm(x[i].mT, grad[i], out=step[i])
                if i:
                    torch.bmm(grad[i], weight[i].mT, out=below[i])

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(normalize: bool, size: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(2000, SIZES[0], generator=generator) < 0.13).float()
    labels = torch.randint(SIZES[-1], (2000,), generator=generator)
    order = torch.randint(2000, (STEPS, size, BATCH), generator=generator)
    replicas = Replicas(range(size), [0.1] * size, SIZES, normalize=normalize)
    network = plain_network(replicas, 0)
    plain = plain_loop(network, images, labels, order[:, 0], 0.1)
    ours = batched_loop(replicas, images, labels, order, torch.full((size, 1, 1), 0.1))
    torch.testing.assert_close(ours()[0].item(), plain(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        replicas.hidden[0].weight[0].T, network[0].weight.detach(), rtol=1e-3, atol=1e-5
    )
    matmul = bare_products(size)
    matmul()
    times = [(seconds(plain), seconds(ours), seconds(matmul)) for _ in range(repeats)]
    per_step = [1e3 / STEPS, 1e3 / STEPS / size, 1e3 / STEPS / size]
    plain_ms, ours_ms, matmul_ms = (
        statistics.median(row[i] for row in times) * per_step[i] for i in range(3)
    )
    faster = statistics.median(size * p / o for p, o, _ in times)
    over = statistics.median(o / b for _, o, b in times)
    print(
        f"{'with BN' if normalize else 'without':>8}: plain {plain_ms:.3f} ms a step, ours "
        f"{ours_ms:.3f}, its matrix products alone {matmul_ms:.3f};  "
        f"plain / ours = {faster:.2f},  ours / matmul = {over:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="networks trained at once")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a few repeats, to see that it runs")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else arguments.repeats
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.seeds} networks "
        f"at once, n = {repeats} repeats of {STEPS} steps; equal losses and weights: checked"
    )
    for normalize in (False, True):
        compare(normalize, arguments.seeds, repeats)


if __name__ == "__main__":
    main()
