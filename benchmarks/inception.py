"""BN-Inception, training and inference: ours against the published PyTorch port, same weights.

    python benchmarks/inception.py                     # 16 images of 224 x 224, ten repeats
    python benchmarks/inception.py --quick             # 4 images, three repeats
    python benchmarks/inception.py --threads 1         # by processor time, on a busy machine

Contenders: the port (``pretrainedmodels``, the ``test`` extra), which is the reference; ours; for
inference also ours folded; and torchvision's GoogLeNet with batch normalization, for scale (it is
another network).  All are channels-last.

Each repeat times every contender once, in alternating order; a row gives the median of the ratios
of these pairs, port / contender, so that more than 1 is faster, with their quartiles.  In the same
run: the largest difference of ours from the port in outputs and gradients, in float64, as a share
of the largest value; the peak memory of one training step beyond parameters, by the allocator's own
record; and the share of the port's step that is convolution, whose inverse bounds what a change of
everything else could bring.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from bnlib import fold_batch_norm, population_statistics
from bnlib.inception import BNInception, load_cadene, to_cadene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pretrainedmodels
from torchvision.models import googlenet

LIMIT = 1e-9  # largest difference accepted, float64
CHANNELS_LAST = torch.channels_last


def networks() -> dict[str, nn.Module]:
    """The contenders for training; all but GoogLeNet compute the same function."""
    port = pretrainedmodels.bninception(num_classes=1000, pretrained=None)
    population_statistics(port, [torch.rand(8, 3, 224, 224)])  # else maps fade to denormal numbers
    plain = load_cadene(port.state_dict(), conv_bias=False)
    google = googlenet(weights=None, aux_logits=False, init_weights=False)
    nets = {"port": port, "ours": plain, "googlenet": google}
    return {name: net.to(memory_format=CHANNELS_LAST) for name, net in nets.items()}


def train(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.zero_grad()
    cross_entropy(net(images), labels).backward()


def infer(net: nn.Module, images: Tensor, _: Tensor) -> None:
    with torch.inference_mode():
        net(images)


def clock() -> tuple[str, Callable[[], float]]:
    """Processor time where one thread does all the work: others on the machine do not count."""
    if torch.get_num_threads() == 1:
        return "processor time", time.thread_time
    return "elapsed time", time.perf_counter


def race(
    step: Callable[[nn.Module, Tensor, Tensor], None],
    nets: dict[str, nn.Module],
    images: Tensor,
    repeats: int,
) -> dict[str, list[float]]:
    labels = torch.arange(len(images)) % 1000
    _, now = clock()
    times: dict[str, list[float]] = {name: [] for name in nets}
    order = list(nets)
    for repeat in range(repeats + 1):
        for name in order if repeat % 2 else order[::-1]:
            start = now()
            step(nets[name], images, labels)
            if repeat:  # the first warms up
                times[name].append(now() - start)
    return times


def show(times: dict[str, list[float]], count: int, notes: dict[str, str]) -> None:
    for name, own in times.items():
        ratios = [a / b for a, b in zip(times["port"], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = count / statistics.median(own)
        print(
            f"  {name:18s} {rate:7.1f} img/s   port/this {middle:5.2f} ({low:.2f} to {high:.2f})"
            f"   {notes.get(name, '')}"
        )


def difference(exact: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest over the tensors, each as a share of its own largest value."""
    return max(float((t - other[key]).abs().max() / t.abs().max()) for key, t in exact.items())


def results(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits and gradients under the port's names, in float64."""
    net = copy.deepcopy(net).double().train()
    y = net(images.double())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double())
    gradients = {name: p.grad for name, p in net.named_parameters()}
    if isinstance(net, BNInception):
        for p in net.parameters():
            p.data = p.grad
        gradients = to_cadene(net)
    return {"logits": y.detach(), **gradients}


def deviations(nets: dict[str, nn.Module], images: Tensor) -> tuple[float, float]:
    """Largest differences of ours from the port: of the logits, and of the gradients.

    The gradient of a bias before batch normalization is zero; what a network has there is rounding.
    """
    port, ours = results(nets["port"], images), results(nets["ours"], images)
    logits = {"logits": port.pop("logits")}
    convolutions = {n for n, m in nets["port"].named_modules() if isinstance(m, nn.Conv2d)}
    gradients = {n: g for n, g in port.items() if n.removesuffix(".bias") not in convolutions}
    return difference(logits, ours), difference(gradients, ours)


def peak_memory(net: nn.Module, images: Tensor) -> float:
    """MiB that one training step adds at most to what stands before it."""
    labels = torch.arange(len(images)) % 1000
    train(net, images, labels)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(net, images, labels)
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most / 2**20


def convolution_share(net: nn.Module, images: Tensor) -> float:
    labels = torch.arange(len(images)) % 1000
    train(net, images, labels)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        train(net, images, labels)
    spent = {e.key: e.self_cpu_time_total for e in record.key_averages()}
    return sum(t for key, t in spent.items() if "conv" in key.lower()) / sum(spent.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="4 images, three repeats")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.size, args.repeats = 4, 224, 3
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, "
        f"{args.batch} x 3 x {args.size} x {args.size}, n = {args.repeats}, {clock()[0]}"
    )
    images = torch.rand(args.batch, 3, args.size, args.size).to(memory_format=CHANNELS_LAST)
    nets = networks()
    logits, gradients = deviations(nets, images[:2])
    print(f"  ours: off the port by {logits:.1e} in logits, {gradients:.1e} in gradients")
    if max(logits, gradients) > LIMIT:
        raise SystemExit("ours computes something else than the port")

    print("inference")  # first: what training leaves in the allocator would serve some more
    ready = {name: net.eval() for name, net in nets.items()}
    assert isinstance(ready["ours"], BNInception)
    ready["ours, folded"] = fold_batch_norm(ready["ours"]).to(memory_format=CHANNELS_LAST)
    with torch.inference_mode():
        port, folded = ready["port"](images), ready["ours, folded"](images)
    print(f"  ours, folded: off by {difference({'y': port}, {'y': folded}):.1e} in float32")
    show(race(infer, ready, images, args.repeats), args.batch, {})

    print("training")
    for net in nets.values():
        net.train()
    memory = {name: peak_memory(net, images) for name, net in nets.items()}
    share = convolution_share(nets["port"], images)
    notes = {name: f"peak {m:.0f} MiB, {m / memory['port']:.2f}" for name, m in memory.items()}
    show(race(train, nets, images, args.repeats), args.batch, notes)
    print(f"  convolutions: {share:.0%} of the port's step")


if __name__ == "__main__":
    main()
