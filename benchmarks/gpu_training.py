"""Training on one GPU: BN-Inception against the published port, and against what the GPU can do.

    python benchmarks/gpu_training.py                  # everything, about eight minutes on an H200
    python benchmarks/gpu_training.py --part norm      # or network, or data
    python benchmarks/gpu_training.py --dry-run        # the same code on the CPU, tiny: no numbers

On a machine without a package index, carry the packages that it lacks; TorchCodec's wheel is for
one version of Python, that machine's:

    python -m pip wheel --no-deps --wheel-dir wheels pretrainedmodels==0.7.4 munch six
    python -m pip download --no-deps --only-binary=:all: --dest wheels --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 torchcodec==0.17.0
    python -m pip install --no-index --no-deps --target site wheels/*.whl            # there
    export PYTHONPATH=site:.
    python benchmarks/gpu_training.py --part norm --out out             # first: compiles and checks
    python benchmarks/gpu_training.py --part network --out out
    python benchmarks/gpu_training.py --part data --out out             # compares with the above

``network``: forward and backward pass and SGD with momentum at 224 x 224, bfloat16 autocast,
channels last, for the port (``pretrainedmodels``), ours in several modes, and torchvision's
ResNet-50 and GoogLeNet for scale.  Modes: eager; graph, the whole step as one CUDA graph; fused,
normalization and ReLU in our kernels; compiled, by ``torch.compile``.  All stand side by side; a
round times each once, in alternating order; printed are medians and quartiles over the rounds, the
peak memory, and the share of the floor that :mod:`gpu.floor` counts, at ceilings measured in the
same run.  ``norm``: normalization with ReLU alone, at the network's own shapes.  ``data``: images a
second from files to the GPU.

Equality comes first: ours against the port in float64 with tolerance 1e-9, logits and gradients,
on the CPU; the kernels against float64 at every shape, 1e-5 in float32 and 2^-7 in bfloat16, sums
over a map 1e-4 in both; the network in our kernels in float32, ten times as far off float64 as
torch's own at most; every mode in bfloat16 against the port by its losses, 5%, and its first
logits.  What fails is left out, the rest is measured, and the command fails at its end.

Each part is written as a recorded run of the experiment ``gpu-training``, anew after every size of
mini-batch: what is cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import re
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu import clock, contenders, data, floor, norm
from gpu.contenders import quartiles
from torch import nn

from bnlib import runs
from bnlib.inception import bn_inception

PARTS = ("norm", "network", "data")
BATCHES = (128, 32, 512)  # the most telling one first


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all, in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--modes", nargs="+", help="such as eager 'fused, graph'; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--limit", type=float, default=450, help="seconds; the rest is left out")
    parser.add_argument("--out", type=Path, help="folder for the recorded runs; default: data/runs")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; writes nothing")
    return parser.parse_args()


class Bench:
    """What the parts share: the device, its ceilings, the networks, the clock, the records.

    Attributes
    ----------
    wrong
        What computed something else than it should.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.wrong: list[str] = []
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.device = torch.device("cpu" if args.dry_run else "cuda:0")
        self.least = 0.001 if args.dry_run else 0.1  # seconds that are timed at once
        if args.dry_run:
            args.batches, args.rounds = (2,), 2
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        name = "CPU" if args.dry_run else torch.cuda.get_device_name()
        self.slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.machine = clock.ceilings(self.device, small=args.dry_run)
        print(
            f"torch {torch.__version__}, {name}: a copy moves "
            f"{self.machine.bytes_per_s / 1e12:.2f} TB/s, a bf16 product does "
            f"{self.machine.operations_per_s / 1e12:.0f} TFLOP/s",
            flush=True,
        )

    def late(self) -> bool:
        return time.perf_counter() - self.start > self.args.limit

    def networks(self) -> dict[str, nn.Module]:
        """Of every name; "ours" with the port's weights, after it has shown that it is the same."""
        try:
            import inception
        except ImportError as error:
            raise SystemExit(
                f"the reference is missing ({error}): pip install pretrainedmodels==0.7.4 munch "
                "six, or carry the wheels over; the head of this file has the commands"
            ) from error
        from torchvision.models import resnet50

        found = inception.networks()
        images = torch.rand(2, 3, self.args.size, self.args.size)
        for name, off in inception.deviations(found, images).items():
            if not max(off) <= inception.LIMIT:
                raise SystemExit(f"{name} computes something else than the port: off by {off}")
            print(f"  {name}: off the port by {off[0]:.0e} and {off[1]:.0e} in float64")
        return {
            "port": found["port"],
            "ours": found["ours"],
            "googlenet": found["googlenet"],
            "resnet50": resnet50(),
        }

    def write(self, part: str, columns: dict[str, list[Any]]) -> None:
        if self.args.dry_run or not next(iter(columns.values())):
            return
        folder = runs.write(
            "gpu-training", self.slug + part, columns,
            configuration={
                **{k: str(v) for k, v in vars(self.args).items() if k != "out"},
                "copy_bytes_per_s": self.machine.bytes_per_s,
                "product_operations_per_s": self.machine.operations_per_s,
                "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                "left_out_as_wrong": self.wrong,
            },
            seed=0, dataset={"name": "made" if part == "-data" else "random numbers", "sha256": ""},
            started=self.started, duration_s=time.perf_counter() - self.start, root=self.args.out,
        )  # fmt: skip
        print(f"  written: {folder}", flush=True)

    def network_part(self) -> None:
        networks = self.networks()
        rows: list[dict[str, Any]] = []
        if self.device.type == "cuda":
            self.wrong += contenders.check_fused(networks["ours"], self.args.size, self.device)
        for batch in self.args.batches:
            if self.late():
                break
            print(f"mini-batches of {batch}, n = {self.args.rounds} rounds")
            rows += self.one_batch(networks, batch)
            self.write(
                "", {k: [row[k] for row in rows] for k in rows[0]} if rows else {"batch": []}
            )
        for what, reached in aims(rows).items():
            print(f"  {'PASS' if reached else 'FAIL'}  {what}")

    def one_batch(self, networks: dict[str, nn.Module], batch: int) -> list[dict[str, Any]]:
        size = self.args.size
        images = torch.randn(batch, 3, size, size, device=self.device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(1000, (batch,), device=self.device)
        wanted = [key for key in contenders.ALL if not self.args.modes or key[1] in self.args.modes]
        if self.args.modes and ("port", "eager") not in wanted:
            wanted.insert(0, ("port", "eager"))  # the reference
        ready = contenders.prepare(networks, wanted, images, labels, self.late)
        self.wrong += contenders.check(ready)
        times = contenders.race(ready, self.device, self.args.rounds, self.least)
        rows = []
        for (name, mode), own in times.items():
            low, middle, high = quartiles(own)
            least = floor.step_seconds(networks[name], batch, size, self.machine)
            kernels = float("nan")
            if mode in ("graph", "fused, graph", "compiled, graph"):
                kernels = self.kernel_seconds(ready[name, mode])
            row = {
                "network": name, "mode": mode, "batch": batch, "images_per_s": batch / middle,
                "images_per_s_low": batch / high, "images_per_s_high": batch / low,
                "peak_mib": ready[name, mode].peak / 2**20, "floor_images_per_s": batch / least,
                "kernels_share_of_step": kernels / middle,
            }  # fmt: skip
            reference = quartiles(times["port", "eager"])[1] if ("port", "eager") in times else 0
            print(
                f"  {name + ', ' + mode:22s}{row['images_per_s']:8.0f} img/s "
                f"({row['images_per_s_low']:.0f} to {row['images_per_s_high']:.0f}), "
                f"{reference / middle:5.2f} times the port, {least / middle:4.0%} of the floor's "
                f"{batch / least:.0f}, peak {row['peak_mib']:.0f} MiB"
                + (f", kernels {kernels / middle:.0%} of the step" if kernels == kernels else "")
            )
            rows.append(row)
        del ready
        contenders.forget()
        torch._dynamo.reset()
        return rows

    def kernel_seconds(self, contender: contenders.Contender) -> float:
        if self.device.type != "cuda":
            return float("nan")
        try:
            return clock.kernel_seconds(contender.step) or float("nan")
        except RuntimeError as error:  # profiling may be forbidden
            print(f"  the time of kernels is not known: {error}")
            return float("nan")

    def norm_part(self) -> None:
        network: nn.Module = bn_inception(pool_proj_4cd=128)
        size = self.args.size
        if self.args.dry_run:
            network, size = bn_inception().conv1, 32
        columns: dict[str, list[float]] = {name: [] for name in norm.COLUMNS}
        for batch in self.args.batches:
            if batch > 128:  # more of the same
                continue
            print(f"normalization with ReLU alone, bf16, mini-batches of {batch}")
            try:
                found = norm.measure(
                    network, batch, size, self.device, self.machine, self.args.rounds,
                    self.late, self.wrong,
                )  # fmt: skip
            except RuntimeError:
                if not self.args.dry_run:
                    raise
                print("  the kernels need a CUDA device, or TRITON_INTERPRET=1 in a dry run")
                return
            for name, values in found.items():
                columns[name] += values
            self.write("-norm", columns)
            norm.show(columns, batch)

    def data_part(self) -> None:
        print("photographs of 500 x 375 to mini-batches of 128 on the device")
        small = self.args.dry_run
        network: nn.Module = bn_inception(pool_proj_4cd=128)
        if small:
            network = nn.Sequential(network.conv1, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        rates = data.measure(
            network, self.device, 4 if small else 128, self.args.size, 0.0 if small else 5.0,
            16 if small else 512,
        )  # fmt: skip
        columns: dict[str, list[Any]] = {
            "way": list(rates),
            "workers": [data.WORKERS] * len(rates),
            "arriving_images_per_s": [arriving for arriving, _ in rates.values()],
            "trained_images_per_s": [trained for _, trained in rates.values()],
        }
        self.write("-data", columns)
        data.show(rates, self.fastest())

    def fastest(self) -> float | None:
        """Of ours at mini-batches of 128, as recorded on this device."""
        try:
            run = runs.read("gpu-training", self.slug, root=self.args.out)
            return float(max(run.where(network="ours", batch=128)["images_per_s"]))
        except (runs.RunError, ValueError):
            print("  (no recorded run of the network on this device to compare with)")
            return None


def aims(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What this benchmark is for, and whether it was reached."""

    def best(network: str, batch: int, mode: str = "") -> dict[str, Any]:
        fitting = [r for r in rows if (r["network"], r["batch"]) == (network, batch)]
        fitting = [r for r in fitting if mode in ("", r["mode"])]
        nothing = {"images_per_s": 0.0, "mode": "nothing", "floor_images_per_s": float("inf")}
        return max(fitting, key=lambda row: row["images_per_s"], default=nothing)

    ours, port = best("ours", 128), best("port", 128, "eager")
    found = {}
    if port["images_per_s"]:
        ratio = ours["images_per_s"] / port["images_per_s"]
        share = ours["images_per_s"] / ours["floor_images_per_s"]
        found[f"128: {ratio:.2f} times the port ({ours['mode']}; aim: 2)"] = ratio >= 2
        found[f"128: {share:.0%} of the floor (aim: 60%)"] = share >= 0.6
    for row in rows:
        if row["network"] == "ours" and row["batch"] == 32 and "graph" in row["mode"]:
            share = row["kernels_share_of_step"]
            what = f"32: kernels are {share:.0%} of a step ({row['mode']}; aim: 90%, no launches)"
            found[what] = share >= 0.9
    return found


def main() -> None:
    args = arguments()
    if not args.dry_run and not torch.cuda.is_available():
        print("needs a CUDA device; --dry-run tries the same code on the CPU, without numbers")
        return
    bench = Bench(args)
    for part in args.part or PARTS:
        try:
            getattr(bench, f"{part}_part")()
        except (Exception, SystemExit) as error:  # the other parts may do
            traceback.print_exc()
            bench.wrong.append(f"{part}: {type(error).__name__}: {error}")
    print(f"done in {time.perf_counter() - bench.start:.0f} s")
    if bench.wrong:
        raise SystemExit("\n".join(["not all is right:", *bench.wrong]))


if __name__ == "__main__":
    main()
