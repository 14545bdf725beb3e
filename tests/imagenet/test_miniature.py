"""The fair trial: what is scaled, how rates are searched, and that runs are recorded once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from imagenet_runs import use_tiny_network
from images import write_folder

from bnlib import runs
from bnlib.imagenet import RECIPES
from bnlib.imagenet.data.source import SourceError
from bnlib.imagenet.evaluation.predictions import read_probabilities, run_name
from bnlib.imagenet.miniature import main, prepare
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.trial import CHANGES, PARTS, SEARCHED, Trial

IMAGES, CLASSES = 8000, 20
TRIAL = Trial(seeds=2)
BEST = {"inception": 0.012, "bn-baseline": 0.024, "bn-x5": 0.06, "bn-x5-sigmoid": 0.03}


def record(root: Path, recipe: Recipe, accuracy: float, verdict: str = "finished") -> None:
    """A made-up recording of a run that ended with that accuracy."""
    columns = {
        "step": [recipe.steps],
        "part": ["held out"],
        "cross_entropy_nats": [1.0],
        "top1": [accuracy],
        "top5": [1.0],
    }
    runs.write(
        TRIAL.experiment,
        recipe.name,
        columns,
        configuration={"recipe": dataclasses.asdict(recipe)},
        seed=recipe.seed,
        dataset={"name": "made up", "sha256": ""},
        started="",
        duration_s=0.0,
        verdict=verdict,
        root=root,
    )


def search(root: Path, best: dict[str, float]) -> list[Recipe]:
    """Play a search to its end: the accuracy falls with the distance from the best rate."""
    made = []
    while found := TRIAL.search(IMAGES, CLASSES, root):
        for recipe in found:
            network = next(n for n in best if recipe.name.startswith(f"search-{n}-steps"))
            distance = abs(math.log(recipe.learning_rate / best[network]))
            record(root, recipe, 0.5 - 0.1 * distance)
        made += found
    return made


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    search(root, BEST)
    return root


@pytest.mark.parametrize("network", ["inception", "bn-x5", "bn-x30"])
def test_the_rate_falls_over_a_run_as_far_as_the_papers_does(network: str) -> None:
    full, small = RECIPES[network], TRIAL.scaled(RECIPES[network], IMAGES, CLASSES)
    longer = TRIAL.scaled(RECIPES[network], IMAGES, CLASSES, steps=3 * small.steps)
    fallen = [
        recipe.learning_rate_at(recipe.steps - 1, images / 32) / recipe.learning_rate
        for recipe, images in ((full, 1_281_167), (small, IMAGES), (longer, IMAGES))
    ]
    assert fallen[0] == pytest.approx(fallen[1], rel=0.05) == pytest.approx(fallen[2], rel=0.05)


def test_inception_trains_five_times_as_long_as_the_changed_networks() -> None:
    steps = {name: TRIAL.scaled(each, IMAGES, CLASSES).steps for name, each in RECIPES.items()}
    assert steps["inception"] == steps["bn-baseline"] == 5 * steps["bn-x5"]
    assert steps["bn-x5"] == steps["bn-x30"] == steps["bn-x5-sigmoid"]


def test_nothing_else_is_changed() -> None:
    small = TRIAL.scaled(RECIPES["bn-x30"], IMAGES, CLASSES)
    differing = {
        field.name
        for field in dataclasses.fields(small)
        if getattr(small, field.name) != getattr(RECIPES["bn-x30"], field.name)
    }
    assert differing == set(
        "width image_size stem_stride num_classes steps shards lr_decay_epochs "
        "statistics_batches".split()
    )


def test_a_run_is_evaluated_often_enough_to_see_a_ratio_of_two_hundred() -> None:
    steps = TRIAL.evaluated_at(50_000)
    assert steps[0] == 250
    assert steps[-1] == 50_000
    ratios = [later / earlier for earlier, later in itertools.pairwise(steps)]
    assert max(ratios) < 1.45
    assert TRIAL.evaluated_at(100) == [100]


@pytest.mark.parametrize("factor", [1, 1 / 8, 8])
def test_the_search_finds_the_best_rate_wherever_it_lies(tmp_path: Path, factor: float) -> None:
    best = {name: rate * factor for name, rate in BEST.items()}
    made = search(tmp_path, best)
    assert {recipe.seed for recipe in made} == {100}
    for network, rate in best.items():
        found = TRIAL.best_rate(network, tmp_path)
        assert max(found / rate, rate / found) < 1.5
        full = TRIAL.steps(RECIPES[network])
        own = [recipe for recipe in made if recipe.name.startswith(f"search-{network}-steps")]
        rates = sorted(recipe.learning_rate for recipe in own if recipe.steps == full // 10)
        assert rates[0] < found < rates[-1], "the best is inside the grid"
        assert sum(recipe.steps == full // 4 for recipe in own) == 2


def test_a_rate_at_which_a_network_diverged_is_not_chosen(tmp_path: Path) -> None:
    for recipe in TRIAL.search(IMAGES, CLASSES, tmp_path):
        fails = recipe.learning_rate > RECIPES["bn-x5"].learning_rate
        record(
            tmp_path, recipe, 0.9 if fails else 0.1, "diverged at step 1" if fails else "finished"
        )
    lower = [r for r in TRIAL.search(IMAGES, CLASSES, tmp_path) if "bn-x5-steps" in r.name]
    assert max(recipe.learning_rate for recipe in lower) < 4 * RECIPES["bn-x5"].learning_rate


def test_without_a_search_no_rate_is_made_up(tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match="run the search first"):
        list(TRIAL.arms(IMAGES, CLASSES, tmp_path))


def test_arm_a_has_the_papers_relations_and_arm_b_each_networks_own_best(searched: Path) -> None:
    rates = {r.name: r.learning_rate for r in TRIAL.arms(IMAGES, CLASSES, searched)}
    best = {network: TRIAL.best_rate(network, searched) for network in SEARCHED}
    base = rates["a-inception-seed-0"]
    assert base == rates["a-bn-baseline-seed-0"] == pytest.approx(best["inception"])
    assert rates["a-bn-x5-seed-0"] == rates["a-bn-x5-sigmoid-seed-1"] == pytest.approx(5 * base)
    assert rates["a-bn-x30-seed-1"] == pytest.approx(30 * base)
    for network in ("bn-baseline", "bn-x5", "bn-x5-sigmoid"):
        assert rates[f"b-{network}-seed-1"] == best[network]
    assert "b-inception-seed-0" not in rates


def test_each_ablation_takes_one_change_back(searched: Path) -> None:
    full = next(r for r in TRIAL.arms(IMAGES, CLASSES, searched) if r.name == "b-bn-x5-seed-0")
    seen = set()
    for recipe in Trial(seeds=1).ablation(IMAGES, CLASSES, searched):
        (field,) = {
            field.name
            for field in dataclasses.fields(recipe)
            if getattr(recipe, field.name) != getattr(full, field.name)
        } - {"name"}
        seen.add(field)
    assert seen == set(CHANGES.values())
    assert len(CHANGES) == 7


def test_all_runs_have_names_of_their_own(searched: Path) -> None:
    names = [r.name for part in PARTS.values() for r in part(TRIAL, IMAGES, CLASSES, searched)]
    assert len(names) == len(set(names)) == 2 * (5 + 3 + 2 + 2 * 11 + 7) + 2 + 6


def distributed(folder: Path, classes: int) -> Path:
    """Made-up files where Tiny ImageNet has its images."""
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
    prepare(tiny, tmp_path / "few", 5, held_out=1)
    prepare(tmp_path / "few", tmp_path / "fewer", 2, held_out=1)  # an image folder will do as well
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
        prepare(tiny, tmp_path / "few", 2, held_out=1)


def test_more_images_can_be_held_out_than_tiny_imagenet_does(tmp_path: Path) -> None:
    prepare(distributed(tmp_path / "tiny", 4), tmp_path / "few", 2, held_out=3)
    for name in ("n00000000", "n00000002"):
        held_out = {path.name for path in (tmp_path / "few" / "val" / name).iterdir()}
        training = {path.name for path in (tmp_path / "few" / "train" / name).iterdir()}
        assert held_out == {f"val_{int(name[1:])}.JPEG", f"{name}_1.JPEG", f"{name}_2.JPEG"}
        assert training == {f"{name}_0.JPEG"}


def test_runs_are_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_network(monkeypatch)
    write_folder(tmp_path / "data", train=24, val=4)
    root = tmp_path / "found"
    command = (
        f"search --data {tmp_path / 'data'} --out {tmp_path / 'runs'} --root {root} --device cpu "
        "--long-steps 40 --short-steps 40 --jobs 1 --only search-bn-x5-steps"
    ).split()
    main(command)
    first = capsys.readouterr().out
    names = runs.names(TRIAL.experiment, root=root)
    assert first.count("finished") == len(names) >= 6
    run = runs.read(TRIAL.experiment, names[0], root=root)
    assert set(run["part"]) == {"training", "held out"}
    main(command)
    assert capsys.readouterr().out == ""


def test_the_members_probabilities_are_recorded_once_and_without_a_path_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_network(monkeypatch)
    write_folder(tmp_path / "data", train=24, val=4)
    root, out = tmp_path / "found", tmp_path / "runs"
    command = (
        f"members --data {tmp_path / 'data'} --out {out} --root={root} --device cpu "
        "--long-steps 40 --short-steps 40 --jobs 1 --only search-bn-x5-steps member-1 member-2"
    ).split()
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "bnlib.imagenet.miniature", *command])
    main(["search", *command[1:]])
    assert not [name for name in runs.names(TRIAL.experiment, root=root) if "probabilities" in name]
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.splitlines() == [
        f"member-{k}: finished, with 1 crops too, with 144 crops too" for k in (1, 2)
    ]
    labels, found = [], []
    for member, crops in itertools.product(("member-1", "member-2"), (1, 144)):
        read = read_probabilities(member, crops, TRIAL.experiment, root=root)
        labels.append(read.labels.tolist())
        found.append(read.probabilities)
    assert labels == 4 * [[0] * 4 + [1] * 4 + [2] * 4]
    assert {tuple(each.shape) for each in found} == {(12, 3)}
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))

    folders = root / TRIAL.experiment
    for path in folders.glob("*/manifest.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), "no path of this machine"
    manifest = runs.read(TRIAL.experiment, run_name("member-2", 144), root=root).manifest
    assert manifest["configuration"]["recipes"][0]["name"] == "member-2"
    assert manifest["dataset"]["name"] == "data/val"
    assert "members --data data --out runs --root=found --device cpu" in manifest["command"]

    (folders / run_name("member-2", 144) / "manifest.json").unlink()  # as after an interruption
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("*")}
    main(command)
    assert capsys.readouterr().out.splitlines() == [
        "member-1: recorded before",
        "member-2: recorded before, with 144 crops too",
    ]
    changed = {path.parent.name for path, time in before.items() if path.is_file()
               and path.stat().st_mtime_ns != time}  # fmt: skip
    assert changed == {run_name("member-2", 144)}
    again = read_probabilities("member-2", 144, TRIAL.experiment, root=root)
    assert torch.equal(again.probabilities, found[-1])


def test_a_member_whose_network_is_gone_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data", train=2, val=1)
    root = tmp_path / "found"
    search(root, BEST)
    (member,) = [r for r in TRIAL.members(6, 3, root) if r.name == "member-1"]
    record(root, member, 0.5)
    words = f"members --data {tmp_path / 'data'} --out {tmp_path} --root {root} --jobs 1"
    main([*words.split(), "--only", "member-1"])
    told = capsys.readouterr().out
    assert "recorded before; probabilities-member-1-1 needs" in told
    assert "network.pt, which is not there" in told
