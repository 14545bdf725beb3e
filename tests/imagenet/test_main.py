"""The command line: it trains, stops, goes on, evaluates; what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from imagenet_runs import (
    SMALL,
    assert_same_end,
    changed,
    command,
    finished,
    forked,
    ranks,
    wait_for_step,
)

from bnlib import runs
from bnlib.__main__ import COMMANDS, DIVERGED, FAILED, FINISHED, USAGE, main
from bnlib.imagenet import ENSEMBLE, RECIPES, Recipe, checkpoint, recipe
from bnlib.imagenet.options import Options
from bnlib.imagenet.training.log import read_metrics

SCALE = (
    "--width 0.25 --image-size 32 --num-classes 3 --batch-size 4 --shards 6 --device cpu".split()
)
SCALED = ("width", "image_size", "num_classes", "batch_size", "shards", "statistics_batches")
QUIET = "--eval-every 0 --statistics-batches 2 --log-every 1 --keep 1 --no-tensorboard".split()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts commands; those that a failing test leaves behind are ended."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        started.append(command(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        for end in (process.terminate, process.kill):
            if process.poll() is None:
                end()  # torchrun ends its processes when it is asked to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers of a killed process


# The commands as a user starts them


def test_the_same_command_goes_on_after_signals_and_a_kill_and_ends_bit_identical(
    data: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """With the paper's network, batch normalization and dropout on."""
    log = tmp_path / "log"

    def arguments(out: str, workers: int) -> list[str]:
        started = ["train", "bn-x30-member-3", "--data", str(data), "--out", str(tmp_path / out)]
        more = ["--steps", "24", "--save-every", "2", "--workers", str(workers)]
        return [*started, *SCALE, *QUIET, *more]

    def whole() -> None:
        raise SystemExit(main([*arguments("whole", 0), "--save-every", "1000"]))

    reached: list[int] = []
    for number, code, workers in (
        (signal.SIGTERM, FINISHED, 1),
        (signal.SIGINT, FINISHED, 0),
        (signal.SIGKILL, -signal.SIGKILL, 1),
    ):
        process = start(*arguments("parts", workers), log=log)
        wait_for_step(tmp_path / "parts", reached[-1] + 2 if reached else 2)
        process.send_signal(number)
        assert process.wait(180) == code, log.read_text()
        reached.append(checkpoint.load(tmp_path / "parts")["step"])
    assert 0 < reached[0] < reached[1] < reached[2] < 24
    text = log.read_text()
    assert "SIGTERM: saving and stopping" in text
    assert "SIGINT: saving and stopping" in text
    assert f"bn-x30-member-3: stopped at step {reached[0]}" in text
    assert f"resumed at step {reached[0]} of 24" in text
    last = forked(lambda: sys.exit(main(arguments("parts", 0))))
    assert finished(last, forked(whole)) == [FINISHED, FINISHED]
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    steps = [r["step"] for r in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 25)), "each step once"
    shutil.rmtree(tmp_path)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_torchrun_trains_with_two_processes_and_goes_on_after_a_kill(
    data: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    log, out, whole = tmp_path / "log", tmp_path / "out", tmp_path / "whole"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--monitor-interval", "0.1", "-m", "bnlib"]
    arguments = ["train", "bn-x30-member-3", "--data", str(data), *SCALE, *QUIET]
    arguments += ["--out", str(out), "--workers", "0", "--steps", "12", "--save-every", "1"]
    process = start(*arguments, log=log, launcher=torchrun)
    wait_for_step(out, 3)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert process.wait(180) != FINISHED
    reached = checkpoint.load(out)["step"]
    assert 3 <= reached < 12
    process = start(*arguments, log=log, launcher=torchrun)
    assert process.wait(180) == FINISHED, log.read_text()
    assert f"resumed at step {reached} of 12" in log.read_text()

    scale = {name: getattr(SMALL, name) for name in SCALED}
    member = recipe("bn-x30-member-3").replace(**scale, steps=12)
    assert finished(*ranks(2, member, data, [whole], changed())) == [0, 0]
    assert_same_end(out, whole)
    shutil.rmtree(tmp_path)


@pytest.mark.usefixtures("tiny")
def test_train_evaluate_and_ensemble_say_what_they_found(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for seed, out in enumerate(outs):
        started = ["train", "bn-x5", "--data", str(data), "--out", str(out), "--seed", str(seed)]
        assert main([*started, *SCALE, *QUIET, "--workers", "0", "--steps", "3"]) == FINISHED
    assert capsys.readouterr().out == "bn-x5: finished\n" * 2
    for crops in ("1", "10", "144"):
        on = ["--data", str(data), "--crops", crops, "--device", "cpu"]
        assert main(["evaluate", str(outs[0]), *on]) == FINISHED
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{outs[0]}: {crops} crops: top-1 ")
        assert line.endswith("12 images")
    assert main(["ensemble", *map(str, outs), *on]) == FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*map(str, outs), "ensemble of 2"]


@pytest.mark.usefixtures("tiny")
def test_the_default_folder_is_named_after_the_recipe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = ["train", "bn-x30-member-2", "--data", str(data), *SCALE, *QUIET]
    assert main([*started, "--workers", "0", "--steps", "2"]) == FINISHED
    folder = tmp_path / "runs" / "bn-x30-member-2"
    record = runs.read("imagenet", "bn-x30-member-2", root=folder / "recorded")
    assert record.manifest["configuration"]["recipe"]["dropout"] == 0.05
    assert record.manifest["seed"] == 2


@pytest.mark.usefixtures("tiny")
def test_a_diverged_run_has_an_exit_code_of_its_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = ["train", "inception-x5", "--data", str(data), "--out", str(tmp_path), *SCALE]
    wild = ["--learning-rate", "1e8", "--steps", "40", "--workers", "0"]
    assert main([*started, *QUIET, *wild]) == DIVERGED == 3
    assert "inception-x5: diverged at step " in capsys.readouterr().out
    record = runs.read("imagenet", "inception-x5", root=tmp_path / "recorded")
    assert record.manifest["verdict"].startswith("diverged at step ")


# Help and errors


def test_without_arguments_the_commands_are_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "bnlib"], capture_output=True, text=True)
    assert done.returncode == USAGE == 2
    assert done.stdout.startswith("usage: python -m bnlib {train,evaluate,ensemble,pack}")
    assert "exit codes: 0 finished" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == FINISHED
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    assert name in text.splitlines()[0]
    assert main(["--help"]) == FINISHED
    assert name in capsys.readouterr().out


def test_the_help_of_train_lists_every_recipe_and_every_field_with_its_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in (Recipe, Options):
        for entry in dataclasses.fields(cls):
            assert f"--{entry.name.replace('_', '-')}" in text
            assert " ".join(entry.metadata["help"].split())[:20] in text
    for name in [*RECIPES, *ENSEMBLE]:
        assert name in text
    assert "reconstruction: GoogLeNet's" in text
    assert "exit codes:" in text


def test_the_help_of_train_needs_no_package_that_only_training_needs() -> None:
    lacking = "import sys; sys.modules |= dict.fromkeys(('tqdm', 'PIL', 'torchvision', 'datasets'))"
    run = f"{lacking}; from bnlib.__main__ import main; main(['train', '--help'])"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (FINISHED, "")
    assert "--learning-rate" in done.stdout


BN_X5 = ["train", "bn-x5", "--data", "."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "bn-x5"], "unknown command 'trian'; the commands are train, evaluate"),
        (["train", "bn-x7", "--data", "."], "bn-x30-member-6"),
        (["train", "bn-x5"], "required: --data"),
        ([*BN_X5, "--learning-rat", "1", "--bogus", "3"], "unrecognized arguments: --bogus 3"),
        ([*BN_X5, "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        ([*BN_X5, "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        ([*BN_X5, "--learning-rate", "nan"], "learning_rate is nan; it must be above 0"),
        ([*BN_X5, "--dropout", "1"], "dropout is 1.0; it must be at least 0 and below 1"),
        ([*BN_X5, "--keep", "0"], "keep is 0; it must be at least 1"),
        ([*BN_X5, "--statistics", "mean"], "argument --statistics: invalid choice: 'mean'"),
        (["evaluate", "--data", "."], "required: checkpoint"),
        (["evaluate", "x", "--data", ".", "--crops", "12"], "argument --crops: invalid choice: 12"),
        (["evaluate", "x", "--data", ".", "--batch", "0"], "argument --batch"),
        (["ensemble", "--data", "."], "required: checkpoint"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(arguments))
    assert ended.value.code == USAGE
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert message in lines[-1]
    assert len(lines) <= 4, "a short usage and the error"


def test_missing_data_and_checkpoints_are_told_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    on = ["--data", str(data), "--device", "cpu"]
    cases = {
        f"{nowhere} does not exist": ["train", "bn-x5", "--data", str(nowhere)],
        f"no train images in {tmp_path}": ["train", "bn-x5", "--data", str(tmp_path)],
        "cannot be divided": [*BN_X5[:3], str(data), "--accumulate", "3"],
        f"{nowhere} cannot be read": ["evaluate", str(nowhere), *on],
        f"{tmp_path} has no checkpoint": ["ensemble", str(tmp_path), *on],
    }
    for message, arguments in cases.items():
        out = ["--out", str(tmp_path / "out")] if arguments[0] == "train" else []
        assert main([*arguments, *out]) == FAILED == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert "Traceback" not in line


def test_what_a_command_lacks_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(_: list[str]) -> int:
        raise ImportError("No module named 'tqdm'")

    monkeypatch.setitem(COMMANDS, "train", lacking)
    assert main(["train"]) == FAILED
    said = capsys.readouterr().err
    assert "No module named 'tqdm'. The commands need: pip install pillow" in said
