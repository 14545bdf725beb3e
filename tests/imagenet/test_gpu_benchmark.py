"""The GPU benchmark without a GPU: its counts by hand, its code on the CPU with tiny networks."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from bnlib import runs
from bnlib.inception import bn_inception, module_costs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_script(*options: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_training.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_one_layer_costs_what_a_hand_count_says():
    from gpu.floor import Machine, step_bytes, step_seconds, work

    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # 3 x 6 x 6 to 8 x 6 x 6
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),  # to 8 x 3 x 3
        nn.Conv2d(8, 4, 1, bias=False),  # to 4 x 3 x 3
    )
    assert [tuple(w) for w in work(layers, 6)] == [
        # forward and the derivative of the weights; images have no derivative
        ("product", 2 * (108 + 288), 2 * 2 * 288 * 27),
        ("normalization", 5 * 288, 0),
        ("pooling", (288 + 72) + (72 + 288) + 288, 0),
        ("product", 3 * (72 + 36), 3 * 2 * 36 * 8),
    ]
    values, parameters = 792 + 1440 + 1008 + 324, 216 + 16 + 32
    assert step_bytes(layers, 10, 6) == 2 * 10 * values + 32 * parameters
    slow_memory = step_seconds(layers, 10, 6, Machine(1e3, 1e30))
    assert slow_memory == pytest.approx(step_bytes(layers, 10, 6) / 1e3)
    slow_products = step_seconds(layers, 10, 6, Machine(1e30, 1e3))
    assert slow_products == pytest.approx(10 * (4 * 7776 + 6 * 288) / 1e3)


def test_the_network_multiplies_as_often_as_its_costs_say():
    from gpu.floor import work

    network = bn_inception()
    costs = {cost.name: cost.multiply_adds for cost in module_costs(network)}
    found = work(network, 224)
    operations = sum(layer.operations for layer in found)
    assert operations == 2 * (3 * sum(costs.values()) - costs["conv1"])
    assert sum(layer.kind == "normalization" for layer in found) == 69
    assert sum(layer.kind == "pooling" for layer in found) == 2 + 10 + 1


class Tiny(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 1000),
        )


@pytest.fixture
def bench(tmp_path):
    import gpu_training

    options = {"batches": (2,), "modes": None, "rounds": 3, "size": 32, "limit": 1e6, "part": None}
    found = gpu_training.Bench(argparse.Namespace(**options, out=tmp_path, dry_run=True))
    found.args.size = 32
    return found


def test_every_contender_runs_and_its_record_can_be_read(bench, tmp_path, capsys):
    torch.manual_seed(0)
    tiny = Tiny()
    rows = bench.one_batch(dict.fromkeys(("port", "ours", "resnet50", "googlenet"), tiny), 2)
    modes = {row["mode"] for row in rows if row["network"] == "ours"}
    assert {"eager", "graph", "compiled", "compiled, graph"} <= modes
    assert all(row["images_per_s_low"] <= row["images_per_s"] for row in rows)
    assert "ours, fused: left out: ValueError" in capsys.readouterr().out
    bench.args.dry_run = False
    bench.write("", {name: [row[name] for row in rows] for name in rows[0]})
    run = runs.read("gpu-training", "cpu", root=tmp_path)
    assert len(run.where(network="ours", batch=2)["images_per_s"]) == len(modes)


def test_a_contender_that_computes_something_else_is_left_out(capsys):
    from gpu.contenders import check, prepare

    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    tiny = Tiny()
    networks = {"port": tiny, "ours": Tiny()}  # not the same weights
    wanted = [("port", "eager"), ("port", "graph"), ("ours", "eager")]
    ready = prepare(networks, wanted, images, labels, lambda: False)
    (line,) = check(ready)
    assert "ours, eager: left out: it computes something else" in line
    assert "first logits" in line
    assert line in capsys.readouterr().out
    assert list(ready) == wanted[:2]


def test_a_part_that_fails_leaves_the_others_their_turn_and_the_command_fails(monkeypatch, capsys):
    import gpu_training

    ran = []

    def broken(_):
        raise RuntimeError("no kernels")

    monkeypatch.setattr(gpu_training.Bench, "norm_part", broken)
    monkeypatch.setattr(gpu_training.Bench, "data_part", lambda _: ran.append("data"))
    monkeypatch.setattr(sys, "argv", "gpu_training --dry-run --part norm --part data".split())
    with pytest.raises(SystemExit, match="norm: RuntimeError: no kernels"):
        gpu_training.main()
    assert ran == ["data"]


def test_contenders_after_the_limit_or_without_memory_are_left_out(monkeypatch, capsys):
    from gpu import contenders

    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    wanted = [("ours", "eager")]
    assert not contenders.prepare({"ours": Tiny()}, wanted, images, labels, lambda: True)
    assert "the time is up" in capsys.readouterr().out

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(contenders, "Contender", full)
    assert not contenders.prepare({"ours": Tiny()}, wanted, images, labels, lambda: False)
    assert "out of memory" in capsys.readouterr().out


def test_aims_are_judged_by_the_best_of_ours():
    from gpu_training import aims

    def row(network: str, mode: str, batch: int, speed: float, kernels: float = math.nan) -> dict:
        return {
            "network": network, "mode": mode, "batch": batch, "images_per_s": speed,
            "floor_images_per_s": 400.0, "kernels_share_of_step": kernels,
        }  # fmt: skip

    rows = [row("port", "eager", 128, 100), row("ours", "eager", 128, 90)]
    assert list(aims(rows).values()) == [False, False]
    rows += [row("ours", "graph", 128, 250), row("ours", "graph", 32, 60, 0.97)]
    assert list(aims(rows).values()) == [True, True, True]
    assert aims([]) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_and_that_is_no_error():
    assert run_script().startswith("needs a CUDA device")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_part_on_normalization_runs_in_the_interpreter():
    output = run_script("--dry-run", "--part", "norm", TRITON_INTERPRET="1")
    assert "64 x  16^2,  1 layers" in output
    assert output.count("normalization alone, batch 2") == 2


# Kernels as they are, then with one gradient off by a thousandth.
CHECKS = """
import torch
from torch import nn
from bnlib.inception import _fused_launch as launch
from bnlib.inception.layers import ConvNormAct
from gpu import contenders, norm

cpu = torch.device("cpu")
shape, right = (2, 8, 16, 16), launch.backward
pair = ConvNormAct(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
network = nn.Sequential(pair, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
assert norm.check(shape, cpu, one_launch=True) == norm.check(shape, cpu, one_launch=False) == []
assert contenders.check_fused(network, 16, cpu) == []

def wrong(*inputs):
    x, gamma, beta = right(*inputs)
    return x, gamma * 1.001, beta

launch.backward = wrong
kinds = ["torch.float32", "torch.bfloat16"]
for line, kind in zip(norm.check(shape, cpu, one_launch=False), kinds, strict=True):
    assert "dl/dgamma" in line and kind in line, line
(line,) = contenders.check_fused(network, 16, cpu)
assert "norm.weight" in line, line
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_checks_of_the_kernels_notice_a_thousandth():
    process = subprocess.run(
        [sys.executable, "-c", CHECKS],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]


def test_a_network_that_does_not_run_in_the_kernels_is_no_fused_contender():
    from gpu.contenders import in_kernels

    from bnlib.inception.fused import _FusedConvNormAct

    pair = _FusedConvNormAct(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    for network in (pair.eval(), Tiny()):  # torch's own operations; nothing fused at all
        with pytest.raises(RuntimeError, match="not all pairs"), in_kernels(network):
            network(torch.randn(2, 3, 32, 32))


def test_the_part_on_data_runs_and_says_what_is_left_out():
    output = run_script("--dry-run", "--part", "data")
    assert "ImageFolder, PIL:" in output
    assert "packed, decoded by" in output
    assert "nvJPEG: left out" in output
