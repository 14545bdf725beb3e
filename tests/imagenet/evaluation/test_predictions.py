"""Recorded evaluations: what is written is what the network says, and can be read back."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from imagenet_runs import (
    QUIET,
    TINY,
    TinyNetwork,
    finished,
    forked,
    free_port,
    image_folder,
    use_tiny_network,
)

from bnlib import runs
from bnlib.__main__ import FAILED, FINISHED, main
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.evaluation.accuracy import Accuracy, load_network
from bnlib.imagenet.evaluation.inference import predict
from bnlib.imagenet.evaluation.predictions import (
    ACCURACIES,
    Evaluated,
    read_probabilities,
    record_accuracies,
    record_probabilities,
    run_name,
)
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.training.loop import train
from bnlib.runs import RunError

pytestmark = pytest.mark.usefixtures("tiny")
ALONE = Processes(0, 1, torch.device("cpu"))


def recorded(name: str, root: Path) -> list[Evaluated]:
    """The rows of a recorded run of accuracies."""
    return [
        Evaluated(
            row.network,
            row.models,
            row.crops,
            Accuracy(row.top1, row.top5, row.n, row.cross_entropy_nats),
        )
        for row in runs.read(ACCURACIES, name, root=root).frame().itertuples()
    ]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks with other seeds."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_network(monkeypatch)
        for seed, folder in enumerate(folders):
            train(TINY.replace(name=f"network-{seed}", seed=seed), data, folder, QUIET)
    return folders


def test_recorded_probabilities_are_those_of_the_network_to_four_digits(
    data: Path, trained: list[Path], tmp_path: Path
) -> None:
    (network, recipe), source = load_network(trained[1]), open_source(data, "val")
    for crops in (1, 144):
        folder = record_probabilities(trained[1], data, crops, "small", tmp_path, device="cpu")
        assert folder == tmp_path / "small" / run_name("network-1", crops)
        parts = predict([network], source, recipe.image_size, crops, group=ALONE)
        expected = torch.cat([part.log_probabilities[0] for part in parts]).exp()
        found = read_probabilities("network-1", crops, "small", root=tmp_path)
        assert found.labels.tolist() == source.labels.tolist()
        torch.testing.assert_close(found.probabilities, expected.double(), rtol=2e-4, atol=0)
        torch.testing.assert_close(
            found.probabilities.sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-15
        )
        digits = {len(entry.lstrip("0.").replace(".", "")) for line in
                  (folder / "metrics.csv").read_text().splitlines()[1:]
                  for entry in line.split(",")[1:] if "e" not in entry}  # fmt: skip
        assert max(digits) == 4
        manifest = runs.read("small", folder.name, root=tmp_path).manifest
        assert manifest["seed"] == [1]
        assert manifest["dataset"] == {"name": str(data / "val"), "sha256": source.fingerprint()}
        assert manifest["configuration"]["recipes"][0]["name"] == "network-1"


def test_nothing_is_recorded_when_an_image_cannot_be_read(
    trained: list[Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    damaged = image_folder(tmp_path_factory)
    (damaged / "val" / "bee" / "001.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"nothing is recorded: bee/001.JPEG"):
        record_probabilities(trained[0], damaged, 1, "small", tmp_path, device="cpu")
    assert not (tmp_path / "small").exists()


def test_probabilities_that_were_not_recorded_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="small/probabilities-none-10"):
        read_probabilities("none", 10, "small", root=tmp_path)


def test_evaluate_and_ensemble_record_what_they_print(
    data: Path,
    trained: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    on = ["--data", str(data), "--device", "cpu"]
    assert main(["evaluate", str(trained[0]), *on, "--record", "single"]) == FINISHED
    root = tmp_path / "elsewhere"
    more = ["--crops", "10", "--record", "six", "--record-root", str(root)]
    assert main(["ensemble", *map(str, trained), *on, *more]) == FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"recorded in {Path('recorded', ACCURACIES, 'single')}"
    assert lines[-1] == f"recorded in {root / ACCURACIES / 'six'}"

    (alone,) = recorded("single", tmp_path / "recorded")
    assert alone[:3] == ("network-0", 1, 1)
    assert lines[0] == f"{trained[0]}: 1 crops: {alone.accuracy}"
    rows = recorded("six", root)
    assert [row[:3] for row in rows] == [
        ("network-0", 1, 10), ("network-1", 1, 10), ("ensemble", 2, 10),
    ]  # fmt: skip
    for row, line in zip(rows, lines[2:], strict=False):
        assert line.endswith(str(row.accuracy))
        assert row.accuracy.n == 12
    manifest = runs.read(ACCURACIES, "six", root=root).manifest
    assert manifest["seed"] == [0, 1]
    assert [each["name"] for each in manifest["configuration"]["recipes"]] == [
        "network-0", "network-1",
    ]  # fmt: skip


def test_two_processes_evaluate_and_record_as_one_does(
    data: Path, trained: list[Path], tmp_path: Path
) -> None:
    port = str(free_port())
    command = ["ensemble", *map(str, trained), "--data", str(data), "--device", "cpu"]

    def work(rank: int, world: int, name: str) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        assert main([*command, "--record", name, "--record-root", str(tmp_path)]) == FINISHED

    cases = [(0, 1, "alone"), (0, 2, "two"), (1, 2, "two")]
    processes = [forked(lambda case=case: work(*case)) for case in cases]  # type: ignore[misc]
    assert finished(*processes) == [0, 0, 0]
    for two, alone in zip(recorded("two", tmp_path), recorded("alone", tmp_path), strict=True):
        assert two[:3] == alone[:3]
        assert (two.accuracy.top1, two.accuracy.n) == (alone.accuracy.top1, 12)
        assert two.accuracy.loss == pytest.approx(alone.accuracy.loss, rel=1e-5)


def test_without_the_flag_nothing_is_recorded(
    data: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(trained[0]), "--data", str(data), "--device", "cpu"]) == FINISHED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../six", "a/b", "..", "."])
def test_a_name_that_would_leave_the_folder_is_refused_before_hours_of_work(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(data, "val")
    with pytest.raises(ValueError, match="cannot name a run"):
        record_accuracies(name, [], recipes=[], source=source, started=0.0, root=tmp_path)
    assert main(["evaluate", "no checkpoint", "--data", str(data), "--record", name]) == FAILED
    assert f"{name!r} cannot name a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_accuracy_survives_the_recording(data: Path, tmp_path: Path) -> None:
    scores = [Accuracy(0.123456789, 0.7, 50_000, 2.3456789), Accuracy(1.0, 1.0, 3, 1e-7)]
    rows = [
        Evaluated(f"network-{k}", 1, crops, score)
        for (k, score), crops in itertools.product(enumerate(scores), (1, 144))
    ]
    source = open_source(data, "val")
    record_accuracies("a", rows, recipes=[TINY], source=source, started=0.0, root=tmp_path)
    for before, after in zip(rows, recorded("a", tmp_path), strict=True):
        assert before[:3] == after[:3]
        assert after.accuracy.n == before.accuracy.n
        assert after.accuracy.top1 == pytest.approx(before.accuracy.top1, rel=1e-5)
        assert after.accuracy.loss == pytest.approx(before.accuracy.loss, rel=1e-5)
        assert after.accuracy.interval() == pytest.approx(before.accuracy.interval(), rel=1e-4)


def test_networks_for_other_crops_make_no_ensemble(
    data: Path, trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = TINY.replace(image_size=48)
    state = {"recipe": larger.to_json(), "step": 1, "model": TinyNetwork(larger).state_dict()}
    torch.save(state, tmp_path / "network.pt")
    both = [str(trained[0]), str(tmp_path)]
    assert main(["ensemble", *both, "--data", str(data), "--device", "cpu"]) == FAILED
    assert "for crops of [32, 48] pixels; one size is needed" in capsys.readouterr().err
