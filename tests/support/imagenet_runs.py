"""Small training runs for the tests: a network of a few layers, processes that can be killed."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from images import write_folder
from torch import Tensor, nn

from bnlib.imagenet import Recipe, checkpoint, recipe
from bnlib.imagenet.options import Options
from bnlib.imagenet.training.loop import train

SMALL = recipe("bn-x5").replace(
    width=0.25, image_size=32, num_classes=3, batch_size=4, steps=8, shards=6, statistics_batches=2
)
TINY = SMALL.replace(dropout=0.3, polyak=0.9, seed=5, learning_rate=0.05)
QUIET = Options(
    device="cpu",
    workers=0,
    tensorboard=False,
    eval_every=0,
    save_every=1000,
    log_every=1,
)
# A forked process has the imports already, so that it can be killed many times at little cost.
FORK = multiprocessing.get_context("fork")
PORTS = itertools.count()


class TinyNetwork(nn.Module):
    """Two convolutions with what training must get right: normalization and dropout."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, 4, bias=recipe.normalization == "none")
        self.norm1 = self._norm(recipe, 8)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, bias=recipe.normalization == "none")
        self.norm2 = self._norm(recipe, 16)
        self.dropout = nn.Dropout(recipe.dropout)
        self.classifier = nn.Linear(16, recipe.num_classes)

    @staticmethod
    def _norm(recipe: Recipe, channels: int) -> nn.Module:
        return nn.Identity() if recipe.normalization == "none" else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu().mean((2, 3))
        logits: Tensor = self.classifier(self.dropout(x))
        return logits


def use_tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes stand for the tiny network, in this process and in those forked from it."""
    monkeypatch.setattr(Recipe, "network", lambda self: TinyNetwork(self))


def image_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of images; and one step of training, so that forks find everything imported."""
    folder = write_folder(factory.mktemp("images"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_network(monkeypatch)
        train(TINY.replace(steps=1), folder, factory.mktemp("warm"), QUIET)
    importlib.import_module("torch._dynamo")  # training in several processes needs it
    return folder


def changed(options: Options = QUIET, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


def tensors(state: Any, prefix: str = "") -> dict[str, Any]:
    """Every tensor and number of the weights, averages and optimizer in a checkpoint, by name."""
    if not prefix:
        state = {part: state[part] for part in ("step", "model", "average", "optimizer")}
    if isinstance(state, dict):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, (list, tuple)):
        items = [(str(key), value) for key, value in enumerate(state)]
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in tensors(value, f"{prefix}.{key}").items()}


def assert_same_end(ours: Path, theirs: Path) -> None:
    """The newest checkpoints of two runs are equal to the last bit."""
    a, b = tensors(checkpoint.load(ours)), tensors(checkpoint.load(theirs))
    assert any(".model." in name for name in a)
    assert any(".momentum_buffer" in name for name in a)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, f"{name} differs"


def forked(work: Callable[[], object]) -> BaseProcess:
    """Start the work in a process of its own."""

    def begin() -> None:
        os.setpgrp()  # so that what it leaves behind can be ended with it
        torch.set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        work()

    process = FORK.Process(target=begin)
    process.start()
    return process


def finished(*processes: BaseProcess) -> list[int | None]:
    """The exit codes, negative for a signal; a process that hangs is killed."""
    deadline = time.monotonic() + 120
    for process in processes:
        # not join(), which also waits for the workers of a killed process: they take seconds to see
        while process.exitcode is None:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError("the process hangs")
            time.sleep(0.005)
        assert process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port that no other process of tests tries: each worker of pytest-xdist has a hundred."""
    first = 10_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in (first + next(PORTS) % 100 for _ in range(100)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"the ports from {first} to {first + 99} are all in use")


def ranks(
    world: int, recipe: Recipe, data: Path, outs: Sequence[Path], options: Options
) -> list[BaseProcess]:
    """Start processes that train together, as torchrun does."""
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(recipe, data, outs[rank % len(outs)], options)

    return [forked(lambda rank=rank: work(rank)) for rank in range(world)]  # type: ignore[misc]


def command(*arguments: object, log: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start ``python -m bnlib`` with its output in a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *(launcher or ["-m", "bnlib"]), *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            # A shell that runs the tests in the background has them ignore the interrupt key.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_for_step(out: Path, step: int) -> None:
    """Until the run has a checkpoint of that step or a later one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        newest = checkpoint.checkpoints(out)[:1]
        if newest and int(newest[0].name[5:14]) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step} in {out}")
