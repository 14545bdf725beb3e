"""The paper's networks in miniature: what is scaled, and that runs are recorded once."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from imagenet_runs import use_tiny_network
from images import write_folder

from bnlib import runs
from bnlib.imagenet import RECIPES
from bnlib.imagenet.data.source import SourceError
from bnlib.imagenet.evaluation.crops import CROPS
from bnlib.imagenet.evaluation.predictions import read_probabilities, run_name
from bnlib.imagenet.miniature import ABLATION, Miniature, main, prepare

IMAGES, CLASSES = 10_000, 20
SMALL = Miniature()


def test_the_ratios_between_learning_rates_are_the_papers() -> None:
    rates = {
        name: SMALL.scaled(each, IMAGES, CLASSES).learning_rate for name, each in RECIPES.items()
    }
    assert rates["inception"] == rates["bn-baseline"] == pytest.approx(SMALL.rate)
    assert rates["bn-x5"] == pytest.approx(5 * SMALL.rate)
    assert rates["bn-x30"] == pytest.approx(30 * SMALL.rate)


def test_the_rate_falls_as_far_as_the_papers_does_over_six_million_steps() -> None:
    full, small = RECIPES["bn-x5"], SMALL.scaled(RECIPES["bn-x5"], IMAGES, CLASSES)
    fallen = [
        recipe.learning_rate_at(recipe.steps - 1, images / 32) / recipe.learning_rate
        for recipe, images in ((full, 1_281_167), (small, IMAGES))
    ]
    assert fallen[0] == pytest.approx(fallen[1], rel=0.05)
    slow = SMALL.scaled(RECIPES["inception"], IMAGES, CLASSES)
    assert slow.lr_decay_epochs == pytest.approx(6 * small.lr_decay_epochs)


def test_nothing_else_is_changed() -> None:
    small = SMALL.scaled(RECIPES["bn-x30"], IMAGES, CLASSES)
    differing = {
        field.name
        for field in dataclasses.fields(small)
        if getattr(small, field.name) != getattr(RECIPES["bn-x30"], field.name)
    }
    assert differing == {
        "image_size",
        "stem_stride",
        "num_classes",
        "steps",
        "shards",
        "learning_rate",
        "lr_decay_epochs",
        "statistics_batches",
    }


def test_each_ablation_takes_one_change_back() -> None:
    base, full = (SMALL.scaled(RECIPES[name], IMAGES, CLASSES) for name in ("bn-baseline", "bn-x5"))
    assert len(ABLATION) == 7
    seen = set()
    for recipe in Miniature(seeds=1).ablation(IMAGES, CLASSES):
        changed = {
            field.name
            for field in dataclasses.fields(recipe)
            if getattr(recipe, field.name) != getattr(full, field.name)
        } - {"name"}
        (name,) = changed
        assert getattr(recipe, name) == getattr(base, name)
        seen.add(name)
    assert len(seen) == 7


def test_all_recipes_and_members_have_names_of_their_own() -> None:
    names = [
        recipe.name
        for plan in (SMALL.sweep, SMALL.networks, SMALL.ablation, SMALL.members)
        for recipe in plan(IMAGES, CLASSES)
    ]
    assert len(names) == len(set(names)) == 5 + 7 * 3 + 7 * 3 + 6


def test_a_sweep_without_numbers_is_refused() -> None:
    for rates in ("", "0.1 fast", "0.1 -1"):
        with pytest.raises(ValueError, match="rates is"):
            Miniature(rates=rates)


def distributed(folder: Path, classes: int) -> Path:
    """Made-up files where Tiny ImageNet has its photographs."""
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number in range(classes):
        name = f"n{number:08d}"
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for index in range(3):
            (images / f"{name}_{index}.JPEG").write_text(f"{number} {index}")
        (folder / "val" / "images" / f"val_{number}.JPEG").write_text(f"val {number}")
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_tiny_imagenet_becomes_a_folder_of_classes(tmp_path: Path) -> None:
    tiny = distributed(tmp_path / "tiny", 10)
    prepare(tiny, tmp_path / "few", 5)
    prepare(tmp_path / "few", tmp_path / "fewer", 2)  # an image folder will do as well
    for name, numbers in (("few", (0, 2, 4, 6, 8)), ("fewer", (0, 4))):
        for part, count in (("train", 3), ("val", 1)):
            found = sorted(path.name for path in (tmp_path / name / part).iterdir())
            assert found == [f"n{number:08d}" for number in numbers]
            for folder in (tmp_path / name / part).iterdir():
                assert len(list(folder.iterdir())) == count
    held_out = tmp_path / "few" / "val" / "n00000004" / "val_4.JPEG"
    assert held_out.read_text() == "val 4"


def test_what_is_not_tiny_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has 0 class folders; 20 are needed"):
        prepare(tmp_path, tmp_path / "few")
    tiny = distributed(tmp_path / "tiny", 4)
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(SourceError, match="has no val images of class n00000000"):
        prepare(tiny, tmp_path / "few", 2)


def begin(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    """The command line: ten steps on made-up photographs."""
    command = f"miniature {arguments} --data data --steps 10 --experiment made-up --root found"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--device", "cpu"])


def test_what_the_members_say_is_recorded_for_every_number_of_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", train=24, val=2)
    begin(monkeypatch, "members networks crops --only bn-x5-member bn-x5-seed-0 --seeds 2")
    main()
    assert "probabilities-bn-x5-seed-1-1: runs/bn-x5-seed-1 has no network.pt" in (
        capsys.readouterr().out
    )
    members = [f"bn-x5-member-{number}" for number in range(1, 7)]
    expected = [run_name(name, crops) for name in members for crops in CROPS]
    found = runs.names("made-up", root=tmp_path / "found")
    assert found == sorted([*expected, *members, "bn-x5-seed-0", run_name("bn-x5-seed-0", 1)])
    three = [
        read_probabilities(members[0], crops, "made-up", root=tmp_path / "found") for crops in CROPS
    ]
    assert all(each.probabilities.shape == (6, 3) for each in three)
    assert not three[0].probabilities.equal(three[1].probabilities)


def test_runs_are_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", train=24, val=4)
    begin(monkeypatch, "sweep --rates 0.01 --rate 0.01")
    main()
    assert capsys.readouterr().out.count("finished") >= 2
    root = tmp_path / "found"
    assert runs.names("made-up", root=root) == ["sweep-0.01", "sweep-0.01-fast-decay"]
    run = runs.read("made-up", "sweep-0.01", root=root)
    assert run.manifest["configuration"]["recipe"]["learning_rate"] == 0.01
    assert set(run["part"]) == {"training", "held out"}
    main()
    assert capsys.readouterr().out.count("recorded before") == 2
