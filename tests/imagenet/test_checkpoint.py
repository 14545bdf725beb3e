"""A run that is killed, damaged or short of space loses nothing that it had saved."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_runs import (
    QUIET,
    TINY,
    assert_same_end,
    changed,
    finished,
    forked,
    ranks,
    tensors,
    use_tiny_network,
    wait_for_step,
)

from bnlib import runs
from bnlib.imagenet import checkpoint
from bnlib.imagenet.checkpoint import CheckpointError
from bnlib.imagenet.training import log as metrics
from bnlib.imagenet.training import loop
from bnlib.imagenet.training.log import Metrics, read_metrics
from bnlib.imagenet.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny")
LONG = TINY.replace(steps=40)
OFTEN = changed(save_every=1)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Where forty steps without interruption lead, and the seconds that they take."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_network(monkeypatch)
        started = time.perf_counter()
        assert finished(forked(lambda: train(LONG, data, out, QUIET))) == [0]
    return out, time.perf_counter() - started


def state(step: int, value: float = 1.0) -> dict[str, Any]:
    return {"recipe": "{}", "step": step, "model": {"weight": torch.full((100,), value)}}


# Killed and resumed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_and_resumed_the_run_ends_bit_identical(
    seed: int, data: Path, tmp_path: Path, uninterrupted: tuple[Path, float]
) -> None:
    rng = random.Random(seed)
    whole, seconds = uninterrupted
    codes: list[int | None] = []
    for attempt in range(10):
        options = changed(OFTEN, workers=attempt % 2)
        process = forked(functools.partial(train, LONG, data, tmp_path, options))
        time.sleep(rng.uniform(0, seconds / 2))
        process.kill()
        codes += finished(process)
    codes += finished(forked(lambda: train(LONG, data, tmp_path, OFTEN)))
    assert -signal.SIGKILL in codes
    assert codes[-1] == 0
    assert_same_end(tmp_path, whole)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, LONG.steps + 1)), "each step once"


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("where", "what", "call"),
    [
        pytest.param(os, "fsync", 9, id="before a checkpoint is on the disk"),
        pytest.param(os, "replace", 5, id="before a checkpoint has its name"),
        pytest.param(Path, "unlink", 7, id="while old ones are removed"),
        pytest.param(torch.optim.SGD, "step", 7, id="before an update"),
        pytest.param(json, "dumps", 9, id="between a checkpoint and the metrics"),
        pytest.param(loop, "evaluate_held_out", 2, id="before an evaluation"),
    ],
)
def test_killed_at_its_weakest_moments_the_run_ends_bit_identical(
    where: Any, what: str, call: int, data: Path, tmp_path: Path, uninterrupted: tuple[Path, float]
) -> None:
    original, calls = getattr(where, what), 0

    def lethal(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            kill_self()
        return original(*arguments, **named)

    options = changed(save_every=2, eval_every=5, keep=2)

    def killed() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(where, what, lethal)
            train(LONG, data, tmp_path, options)

    assert finished(forked(killed)) == [-signal.SIGKILL]
    assert finished(forked(lambda: train(LONG, data, tmp_path, options))) == [0]
    assert_same_end(tmp_path, uninterrupted[0])
    assert not list(tmp_path.glob(".step-*")), "what the kill left is gone"
    assert len(checkpoint.checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("stop", [7, 9])
def test_the_logged_losses_do_not_depend_on_where_a_run_was_interrupted(
    stop: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, original, calls = changed(log_every=5), torch.optim.SGD.step, 0

    def signalled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    recipe = TINY.replace(steps=15)
    train(recipe, data, tmp_path / "whole", options)
    monkeypatch.setattr(torch.optim.SGD, "step", signalled)
    assert train(recipe, data, tmp_path / "parts", options).stopped
    assert train(recipe, data, tmp_path / "parts", options).finished
    whole, parts = (
        [
            (row["step"], row["loss"], row["top1"])
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
            if "loss" in row
        ]
        for name in ("whole", "parts")
    )
    assert [step for step, *_ in whole] == [5, 10, 15]
    assert parts == whole


def test_two_processes_killed_and_resumed_end_bit_identical(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = TINY.replace(steps=30)
    assert finished(*ranks(2, long, data, [whole], QUIET)) == [0, 0]
    for kill in (0, 1):
        pair = ranks(2, long, data, [parts], changed(OFTEN, workers=kill))
        wait_for_step(parts, 3 + 6 * kill)
        pair[kill].kill()
        finished(pair[kill])
        pair[1 - kill].kill()  # as torchrun ends the others when one has ended
        assert -signal.SIGKILL in finished(*pair)
    reached = checkpoint.load(parts)["step"]
    assert 9 <= reached <= 30
    assert finished(*ranks(2, long, data, [parts], OFTEN)) == [0, 0]
    assert_same_end(parts, whole)


def test_processes_that_do_not_share_a_folder_are_told_so(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert finished(*ranks(2, TINY, data, [tmp_path / "one"], QUIET)) == [0, 0]
    longer = TINY.replace(steps=20)
    pair = ranks(2, longer, data, [tmp_path / "one", tmp_path / "two"], changed(adapt=True))
    assert finished(*pair) == [1, 1]
    assert "one process finds a checkpoint of step 8, another of step 0" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_same_call_goes_on(
    number: signal.Signals,
    data: Path,
    tmp_path: Path,
    uninterrupted: tuple[Path, float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = torch.optim.SGD.step
    calls = 0

    def signalled(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.optim.SGD, "step", signalled)
        assert str(train(LONG, data, tmp_path, QUIET)) == "stopped at step 7"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert f"{number.name}: saving and stopping" in caplog.text
    assert checkpoint.load(tmp_path)["step"] == 7
    assert not (tmp_path / "recorded").exists(), "a run that stopped has not come to its end"
    assert train(LONG, data, tmp_path, QUIET).finished
    assert_same_end(tmp_path, uninterrupted[0])


def test_two_processes_stop_together_when_one_is_asked_to(data: Path, tmp_path: Path) -> None:
    long = TINY.replace(steps=10**6)
    pair = ranks(2, long, data, [tmp_path], changed(OFTEN, keep=1))
    wait_for_step(tmp_path, 1)
    assert pair[1].pid
    os.kill(pair[1].pid, signal.SIGTERM)
    assert finished(*pair) == [0, 0]
    assert checkpoint.load(tmp_path)["step"] % 10 == 0
    assert "stopped" in read_metrics(tmp_path / "metrics.jsonl")[-1]["verdict"]


def test_a_finished_run_that_is_started_again_stays_finished(data: Path, tmp_path: Path) -> None:
    assert train(TINY, data, tmp_path, QUIET).finished
    before = tensors(checkpoint.load(tmp_path))
    assert train(TINY, data, tmp_path, QUIET).finished
    after = tensors(checkpoint.load(tmp_path))
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, torch.Tensor))
    assert runs.read("imagenet", "bn-x5", root=tmp_path / "recorded").manifest["verdict"] == (
        "finished"
    )


# Damaged checkpoints


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, emptied])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(
    damage: Any,
    data: Path,
    tmp_path: Path,
    uninterrupted: tuple[Path, float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(LONG, data, tmp_path, changed(save_every=20))
    newest, before = checkpoint.checkpoints(tmp_path)
    newest.write_bytes(damage(newest.read_bytes()))
    caplog.clear()
    assert checkpoint.load(tmp_path)["step"] == 20
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert newest.name in warning
    assert "damaged" in warning
    assert "falling back" in warning
    assert before.exists()
    assert train(LONG, data, tmp_path, QUIET).finished
    assert_same_end(tmp_path, uninterrupted[0])


def test_when_every_checkpoint_is_damaged_training_does_not_start_anew_in_silence(
    data: Path, tmp_path: Path
) -> None:
    train(TINY, data, tmp_path, changed(save_every=4))
    for path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be read"):
        train(TINY, data, tmp_path, QUIET)


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, state(5), keep=1)
    damaged = tmp_path / f"step-000000010-{'f' * 16}.pt"
    damaged.write_bytes(b"nothing")
    saved = checkpoint.save(tmp_path, state(7), keep=1)
    assert checkpoint.checkpoints(tmp_path) == [saved]
    assert checkpoint.load(tmp_path)["step"] == 7
    assert not good.exists()


def test_the_last_few_are_kept_and_one_of_a_step(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        checkpoint.save(tmp_path, state(step), keep=2)
    checkpoint.save(tmp_path, state(100, value=2.0), keep=2)
    steps = [checkpoint.load(path)["step"] for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [100, 10]
    assert checkpoint.load(tmp_path)["model"]["weight"][0] == 2.0


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    harmful = tmp_path / "network.pt"
    evil = {"recipe": "{}", "step": 1, "model": Evil()}
    torch.save(evil, harmful)
    with pytest.raises(CheckpointError, match=r"network\.pt is no checkpoint"):
        checkpoint.load(harmful)
    harmful.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"network\.pt is no checkpoint"):
        checkpoint.load(harmful)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_what_is_no_run_of_this_library_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="lacks 'recipe', 'step' or 'model'"):
        checkpoint.load(tmp_path / "other.pt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there\.pt cannot be read: No such file"):
        checkpoint.load(tmp_path / "there.pt")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpoint.load(tmp_path)


# No space on the disk


def test_a_full_disk_loses_nothing_and_training_goes_on(
    data: Path,
    tmp_path: Path,
    uninterrupted: tuple[Path, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original, save = os.fsync, checkpoint.save
    found: list[list[int]] = []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def watched(folder: Path, values: dict[str, Any], keep: int) -> Path:
        monkeypatch.setattr(os, "fsync", full if 8 <= values["step"] < 24 else original)
        try:
            return save(folder, values, keep)
        finally:
            monkeypatch.setattr(os, "fsync", original)
            found.append([checkpoint.load(p)["step"] for p in checkpoint.checkpoints(folder)])

    monkeypatch.setattr(checkpoint, "save", watched)
    assert train(LONG, data, tmp_path, changed(save_every=4, keep=1)).finished
    assert found == [[4], [4], [4], [4], [4], [24], [28], [32], [36], [40]]
    assert "no checkpoint at step 8: [Errno 28] No space left on device" in caplog.text
    assert not list(tmp_path.glob(".*.tmp"))
    assert_same_end(tmp_path, uninterrupted[0])


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can grow to so many bytes only; what is written beyond fails, as on a full disk.

    Never around more than the lines in question: the file that the tests report to is one, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_checkpoint_that_must_be_written_and_cannot_is_an_error(
    data: Path, tmp_path: Path
) -> None:
    train(TINY.replace(steps=4), data, tmp_path, QUIET)
    (kept,) = checkpoint.checkpoints(tmp_path)
    with full_disk(4000), pytest.raises(OSError, match="File too large"):
        train(TINY, data, tmp_path, changed(adapt=True))
    assert checkpoint.checkpoints(tmp_path) == [kept]
    assert checkpoint.load(tmp_path)["step"] == 4


def test_metrics_that_find_the_disk_full_are_written_with_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports = Metrics(tmp_path, 0, tensorboard=False)
    reports.write(1, loss=1.0)
    with full_disk(40):
        reports.write(2, loss=2.0)
    assert "metrics.jsonl cannot be written" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    reports.write(3, loss=3.0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_failure_of_tensorboard_costs_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    reports = Metrics(tmp_path, 0, tensorboard=True)
    assert reports._board is not None

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = reports._board
    reports.write(1, loss=1.0)
    monkeypatch.setattr(board, "add_scalar", full)
    for step in (2, 3):
        reports.write(step, loss=float(step))
    reports.close()
    board.close()
    assert caplog.text.count("TensorBoard's files cannot be written") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# Metrics


def test_tensorboard_shows_what_the_metrics_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports = Metrics(tmp_path, 0, tensorboard=True)
    reports.write(1, loss=1.5, damaged=0)
    reports.write(2, evaluation={"top1": 0.25})
    reports.write(2, verdict="finished")
    reports.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "damaged", "evaluation/top1"}
    ((step, value),) = [(e.step, e.value) for e in board.Scalars("evaluation/top1")]
    assert (step, value) == (2, 0.25)


@pytest.mark.parametrize("half", ['{"step": 5, "lo', "\0\0\0\0", "{"])
def test_a_last_line_that_a_kill_cut_short_is_left_out(half: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    path.write_text(whole + half)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    Metrics(tmp_path, 3, tensorboard=False).write(4, again=True)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1] == {"step": 4, "again": True}


def test_a_damaged_line_in_the_middle_is_no_kill_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged: .*remove it"):
        read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.read_metrics(tmp_path / "none.jsonl") == []


# Another run's checkpoint


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(
    data: Path, tmp_path: Path
) -> None:
    train(TINY, data, tmp_path, QUIET)
    other = tmp_path / "other data"
    shutil.copytree(data, other)
    next((other / "train" / "ant").iterdir()).unlink()
    recipe = TINY.replace(
        learning_rate=0.1, momentum=0.5, accumulate=2, precision="bf16", statistics="moving"
    )
    before = checkpoint.checkpoints(tmp_path)
    with pytest.raises(CheckpointError) as error:
        train(recipe, other, tmp_path, QUIET)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert "recipe learning_rate: 0.05 there, 0.1 here" in lines
    assert "recipe momentum: 0.9 there, 0.5 here" in lines
    assert "recipe accumulate: 1 there, 2 here" in lines
    assert "recipe precision: 'float32' there, 'bf16' here" in lines
    assert "recipe statistics: 'population' there, 'moving' here" in lines
    assert sum(line.startswith("data set: ") for line in lines) == 1
    assert len(lines) == 8, "what is the same is not listed"
    assert "--adapt" in lines[-1]
    assert checkpoint.checkpoints(tmp_path) == before


def test_a_checkpoint_of_another_number_of_processes_is_refused_unless_told_to_adapt(
    data: Path, tmp_path: Path
) -> None:
    assert finished(*ranks(2, TINY, data, [tmp_path], QUIET)) == [0, 0]
    with pytest.raises(CheckpointError, match="processes: 2 there, 1 here"):
        train(TINY, data, tmp_path, QUIET)
    assert train(TINY, data, tmp_path, changed(adapt=True)).finished


def test_an_adapted_run_goes_on_with_its_own_recipe(data: Path, tmp_path: Path) -> None:
    train(TINY.replace(steps=4, polyak=0), data, tmp_path, QUIET)
    first = checkpoint.load(tmp_path)
    assert first["average"] == {}
    recipe = TINY.replace(momentum=0.5, weight_decay=0.01, learning_rate=1e-9)
    assert train(recipe, data, tmp_path, changed(adapt=True)).finished
    after = checkpoint.load(tmp_path)
    assert (after["step"], json.loads(after["recipe"])["momentum"]) == (8, 0.5)
    groups = after["optimizer"]["param_groups"]
    assert [(g["momentum"], g["weight_decay"]) for g in groups] == [(0.5, 0.01), (0.5, 0.0)]
    for name, parameter in TINY.network().named_parameters():
        for weights in (after["model"][name], after["average"][name]):
            torch.testing.assert_close(weights, first["model"][name], atol=1e-6, rtol=1e-6)
        assert parameter.shape == first["model"][name].shape
