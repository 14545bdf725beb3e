"""One training step of the Figure 1 experiment, per network: stacks against the plain loop.

    python benchmarks/mnist_step.py [--networks 1 4 10] [--threads 1 2] [--repeats 40] [--quick]

These are timed in turn, in one process, over mini-batches of MNIST-shaped binary input (60 x 784,
three hidden layers of 100), which are drawn by ``bnlib.mnist.mini_batches``:

* ``plain``: the loop a user would write for one network: nn.Linear, nn.BatchNorm1d, nn.Sigmoid,
  cross_entropy, backward(), torch.optim.SGD;
* ``stack``: ``bnlib.mnist.stacks`` for all networks at once, as chapters and recordings train them;
* ``stack, torch's BN``: the same with nn.BatchNorm1d in place of bnlib.BatchNorm;
* ``products``: the bare matrix products of the stack, written over preallocated memory.

Printed are medians of the ratios of neighboring repeats, per network: how many plain loops take as
long as one stack. Before timing, the losses and weights of a network are compared with those of its
plain loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from bnlib.mnist import Figure1, Network, mini_batches, stacks
from bnlib.mnist.experiment import build

BATCH, SIZES, STEPS, RATE = 60, (784, 100, 100, 100, 10), 10, 0.1
Batches = Iterator[tuple[Tensor, Tensor]]
Run = Callable[[], object]


def stacked(networks: int, normalize: bool) -> nn.Sequential:
    config = Figure1(normalize=normalize, hidden=SIZES[1:-1], batch_size=BATCH)
    chosen = [Network(seed, RATE, 0.1) for seed in range(networks)]
    return build(config, chosen, inputs=SIZES[0])


def with_torch_norm(stack: nn.Sequential) -> nn.Sequential:
    """The same networks, normalized by torch's layer."""
    for index, layer in enumerate(stack):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            stack[index] = nn.BatchNorm1d(layer.num_features, eps=layer.eps)
    return stack


def plain(stack: nn.Sequential) -> nn.Sequential:
    """The first network of a stack out of torch's own layers."""
    layers: list[nn.Module] = []
    for layer in stack:
        if isinstance(layer, stacks.StackedLinear):
            networks, inputs, outputs = layer.weight.shape
            linear = nn.Linear(inputs, outputs, bias=layer.bias is not None)
            linear.weight.data = layer.weight[0].detach().T.clone()
            if layer.bias is not None:
                linear.bias.data = layer.bias.detach()[:outputs].clone()
            layers.append(linear)
        elif isinstance(layer, nn.Sigmoid):
            layers.append(nn.Sigmoid())
        else:
            layers.append(nn.BatchNorm1d(layer.num_features // networks, eps=layer.eps))
    return nn.Sequential(*layers)


def plain_loop(network: nn.Sequential, batches: Batches) -> Callable[[], float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

    def run() -> float:
        for _ in range(STEPS):
            x, labels = next(batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x[0]), labels[0])
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def stack_loop(stack: nn.Sequential, batches: Batches) -> Callable[[], float]:
    def run() -> float:
        return stacks.train(stack, batches, steps=STEPS, learning_rate=RATE)[-1, 0].item()

    return run


def bare_products(networks: int) -> Run:
    shapes = list(pairwise(SIZES))
    x = [torch.randn(networks, BATCH, inputs) for inputs, _ in shapes]
    weight = [torch.randn(networks, *shape) for shape in shapes]
    grad = [torch.randn(networks, BATCH, units) for _, units in shapes]
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


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def contenders(normalize: bool, networks: int) -> dict[str, Run]:
    """What is timed, by name, after a check that the stack takes the steps of the plain loop."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(2000, SIZES[0], generator=generator) < 0.13).float()
    labels = torch.randint(SIZES[-1], (2000,), generator=generator)

    def batches(count: int) -> Batches:
        return mini_batches(images, labels, BATCH, range(count))

    stack = stacked(networks, normalize)
    network = plain(stack)
    runs: dict[str, Run] = {
        "plain": plain_loop(network, batches(1)),
        "stack": stack_loop(stack, batches(networks)),
    }
    losses = [run() for run in runs.values()]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack[0].weight[0].T, network[0].weight, rtol=1e-3, atol=1e-5)
    if normalize:
        other = with_torch_norm(stacked(networks, normalize))
        runs["stack, torch's BN"] = stack_loop(other, batches(networks))
    runs["products"] = bare_products(networks)
    for run in runs.values():
        run()
    return runs


def compare(normalize: bool, networks: int, repeats: int) -> None:
    runs = contenders(normalize, networks)
    rows = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    one = 1e3 / STEPS * statistics.median(row["plain"] for row in rows)
    ratios = {
        name: statistics.median(networks * row["plain"] / row[name] for row in rows)
        for name in runs
        if name != "plain"
    }
    print(
        f"{'with BN' if normalize else 'without':>8}, {networks:2} networks: plain {one:.2f} ms a "
        "step;  plain / " + ",  / ".join(f"{name} = {value:.2f}" for name, value in ratios.items()),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, nargs="+", default=[1, 4, 10], help="at once")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a few repeats, to see that it runs")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else arguments.repeats
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(
            f"torch {torch.__version__}, threads {threads}, n = {repeats} repeats of {STEPS} "
            "steps; equal losses and weights: checked"
        )
        for normalize in (True, False):
            for networks in arguments.networks:
                compare(normalize, networks, repeats)


if __name__ == "__main__":
    main()
