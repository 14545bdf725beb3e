"""The recipes say what the paper says, mark what it does not, and survive JSON and flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

import pytest
import torch

from bnlib.imagenet import ENSEMBLE, RECIPES, Recipe, fields, recipe

ALL = RECIPES | ENSEMBLE


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    names = [entry.name for entry in dataclasses.fields(Recipe) if entry.name != "name"]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def test_the_papers_seven_networks_are_there_and_the_ensembles_six() -> None:
    assert list(RECIPES) == [
        "inception",
        "bn-baseline",
        "bn-x5",
        "bn-x30",
        "bn-x5-sigmoid",
        "inception-x5",
        "inception-sigmoid",
    ]
    assert list(ENSEMBLE) == [f"bn-x30-member-{number}" for number in range(1, 7)]
    assert all(entry.name == name for name, entry in ALL.items())


def test_the_baseline_differs_from_inception_in_batch_normalization_alone() -> None:
    changed = differences(recipe("inception"), recipe("bn-baseline"))
    assert changed == {"normalization": ("none", "batch")}


def test_the_seven_changes_of_section_4_2_1_lie_between_the_baseline_and_x5() -> None:
    changed = differences(recipe("bn-baseline"), recipe("bn-x5"))
    length = changed.pop("steps")
    assert length[1] < length[0], "fewer steps are the result, not one of the changes"
    assert set(changed) == {
        "learning_rate",
        "dropout",
        "weight_decay",
        "lr_decay_epochs",
        "lrn",
        "within_shard_shuffling",
        "photometric",
    }
    ratio = {n: a / b for n, (a, b) in changed.items() if isinstance(a, float) and b}  # type: ignore[operator]
    assert ratio["learning_rate"] == pytest.approx(1 / 5)
    assert ratio["weight_decay"] == pytest.approx(5)
    assert ratio["lr_decay_epochs"] == pytest.approx(6)
    assert changed["dropout"] == (0.4, 0.0)
    assert changed["lrn"] == (True, False)
    assert changed["within_shard_shuffling"] == (False, True)
    assert 0 < changed["photometric"][1] < changed["photometric"][0]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("base", "name", "changed"),
    [
        ("bn-x5", "bn-x30", {"learning_rate"}),
        ("bn-x5", "bn-x5-sigmoid", {"activation"}),
        ("inception", "inception-x5", {"learning_rate"}),
        ("inception", "inception-sigmoid", {"activation"}),
    ],
)
def test_the_other_networks_change_one_thing(base: str, name: str, changed: set[str]) -> None:
    assert set(differences(recipe(base), recipe(name))) == changed


def test_the_learning_rates_are_those_of_figure_3() -> None:
    rates = {name: entry.learning_rate for name, entry in RECIPES.items()}
    assert rates["inception"] == rates["bn-baseline"] == 0.0015
    assert rates["bn-x5"] == rates["bn-x5-sigmoid"] == rates["inception-x5"] == 0.0075
    assert rates["bn-x30"] == 0.045
    assert all(entry.batch_size == 32 for entry in ALL.values())


def test_the_ensembles_members_are_bn_x30_with_some_of_three_changes() -> None:
    seen = []
    for member in ENSEMBLE.values():
        changed = differences(recipe("bn-x30"), member)
        changed.pop("seed")
        assert changed
        assert set(changed) <= {"init_scale", "dropout", "normalization"}
        assert member.init_scale >= 1
        assert member.dropout in (0, 0.05, 0.1)
        seen.append(changed)
    assert all(seen.count(each) == 1 for each in seen)
    assert len({member.seed for member in ENSEMBLE.values()}) == 6


@pytest.mark.parametrize("entry", dataclasses.fields(Recipe), ids=lambda entry: entry.name)
def test_every_field_says_what_it_is_and_where_it_comes_from(
    entry: dataclasses.Field[object],
) -> None:
    assert len(entry.metadata["help"]) > 3
    assert entry.metadata["source"].startswith(("paper, ", "reconstruction: "))


@pytest.mark.parametrize("name", ALL)
def test_json_gives_back_an_equal_recipe(name: str) -> None:
    text = recipe(name).to_json()
    assert Recipe.from_json(text) == recipe(name)
    assert Recipe.from_json(text).to_json() == text


def test_json_with_a_missing_an_unknown_or_a_wrong_field_is_refused() -> None:
    values = json.loads(recipe("bn-x5").to_json())
    with pytest.raises(ValueError, match="momentum"):
        Recipe.from_json(json.dumps({k: v for k, v in values.items() if k != "momentum"}))
    with pytest.raises(ValueError, match="learning_rat'"):
        Recipe.from_json(json.dumps(values | {"learning_rat": 1}))
    with pytest.raises(TypeError, match="steps"):
        Recipe.from_json(json.dumps(values | {"steps": 1.5}))
    with pytest.raises(ValueError, match="not valid JSON"):
        Recipe.from_json("{")
    with pytest.raises(ValueError, match="object"):
        Recipe.from_json("[]")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("learning_rate", -1.0, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("dropout", 1.0, ValueError),
        ("normalization", "layer", ValueError),
        ("pool_proj_4cd", 64, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", "32", TypeError),
        ("lrn", 1, TypeError),
        ("steps", True, TypeError),
        ("image_size", 16, ValueError),
        ("photometric", 1.5, ValueError),
        ("seed", -1, ValueError),
        ("stepps", 3, TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        recipe("bn-x5").replace(**{field: value})


def test_an_unknown_recipe_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(ValueError, match=r"bn-x31.*inception, bn-baseline.*bn-x30-member-6"):
        recipe("bn-x31")


def from_arguments(base: Recipe, namespace: argparse.Namespace) -> Recipe:
    return base.replace(**fields.given(Recipe, namespace))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    fields.add_arguments(made, Recipe, "recipe")
    return made


def test_every_field_has_a_flag_that_sets_it() -> None:
    other = {
        "normalization": "none",
        "activation": "sigmoid",
        "stem": "separable",
        "precision": "bf16",
        "statistics": "moving",
    }
    for entry in dataclasses.fields(Recipe):
        flag, before = "--" + entry.name.replace("_", "-"), getattr(recipe("bn-x5"), entry.name)
        if isinstance(before, bool):
            given = [flag if not before else flag.replace("--", "--no-")]
        elif entry.name in ("pool_proj_4cd", "stem_stride"):
            given = [flag, {"pool_proj_4cd": "128", "stem_stride": "4"}[entry.name]]
        elif isinstance(before, str):
            given = [flag, other.get(entry.name, "another")]
        elif isinstance(before, int):
            given = [flag, str(before + 1)]
        else:
            given = [flag, "0.5" if entry.name != "max_aspect" else "2"]
        if entry.name == "photometric":
            given[1] = "0.25"
        after = from_arguments(recipe("bn-x5"), parser().parse_args(given))
        assert set(differences(recipe("bn-x5"), after)) | {"name"} == {entry.name, "name"}, flag


def test_flags_that_are_not_given_change_nothing_and_foreign_ones_are_passed_over() -> None:
    namespace = parser().parse_args([])
    namespace.data = "somewhere"
    assert from_arguments(recipe("bn-x30"), namespace) == recipe("bn-x30")
    assert "reconstruction" in parser().format_help()


def test_the_learning_rate_falls_by_four_percent_every_eight_epochs_and_six_times_faster() -> None:
    slow, fast, epoch = recipe("inception"), recipe("bn-x5"), 40_036
    assert slow.learning_rate_at(0, epoch) == slow.learning_rate
    assert slow.learning_rate_at(8 * epoch - 1, epoch) == slow.learning_rate
    assert slow.learning_rate_at(8 * epoch, epoch) == pytest.approx(0.0015 * 0.96)
    assert fast.learning_rate_at(8 * epoch, epoch) == pytest.approx(0.0075 * 0.96**6)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_builds_its_network_scaled_down(name: str) -> None:
    small = recipe(name).replace(image_size=32, num_classes=7)
    network = small.network()
    normalized = any("BatchNorm" in type(module).__name__ for module in network.modules())
    assert normalized == (small.normalization != "none")
    lrn = sum(isinstance(m, torch.nn.LocalResponseNorm) for m in network.modules())
    assert lrn == (2 if small.lrn else 0)
    assert network.dropout.p == small.dropout
    assert any(isinstance(m, torch.nn.Sigmoid) for m in network.modules()) == (
        small.activation == "sigmoid"
    )
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_initial_weights_are_larger_where_the_recipe_says_so() -> None:
    plain = recipe("bn-x30").replace(image_size=32, num_classes=7)
    torch.manual_seed(0)
    weights = plain.network().conv1.conv.weight
    torch.manual_seed(0)
    larger = plain.replace(init_scale=1.5).network().conv1.conv.weight
    torch.testing.assert_close(larger, 1.5 * weights)
