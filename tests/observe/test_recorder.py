"""The recorder against hand-computed statistics, on modules of every kind, leaving no trace."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from untouched import assert_same, everything

from bnlib.observe import ActivationRecorder, find_layers


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(5, 3)
    )


class Odd(nn.Module):
    """Nested, shared, called repeatedly, by keyword, returning a tuple in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 4), nn.Tanh())})
        self.alias = self.block["inner"][0]
        self.unused = nn.Linear(4, 4)
        self.head = Head()

    def forward(self, x: Tensor) -> dict[str, Any]:
        for _ in range(3):
            x = self.block["inner"](x)
        return self.head(scale=2.0, u=self.alias(x))


class Head(nn.Module):
    def forward(self, *, scale: float, u: Tensor) -> dict[str, Any]:
        return {"none": None, "out": (scale * u, u)}


def test_statistics_are_those_computed_by_hand_unit_by_unit() -> None:
    model, x = perceptron(), torch.randn(40, 6)
    with ActivationRecorder(model, ["0"], percentiles=(10, 50), samples=100) as recorder:
        model(x)
    want = model[0](x).detach()
    (record,) = recorder["0"]
    assert record.shape == (40, 5)
    np.testing.assert_allclose(record.percentiles, np.percentile(want, (10, 50), axis=0), rtol=1e-5)
    torch.testing.assert_close(record.moments.mean, want.mean(0))
    torch.testing.assert_close(record.moments.std, want.std(0, correction=0))
    assert record.samples is not None
    torch.testing.assert_close(record.samples, want)
    assert recorder[model[0]] is recorder["0"]


def test_feature_maps_are_units_and_the_percentiles_are_those_of_figure_1_by_default() -> None:
    model, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 9, 9)
    with ActivationRecorder(model, model, samples=7) as recorder:
        y = model(x).detach()
    (record,) = recorder[""]
    want = np.percentile(y.transpose(0, 1).flatten(1), (15, 50, 85), axis=1)
    np.testing.assert_allclose(record.percentiles, want, rtol=1e-5)
    assert record.samples is not None
    assert record.samples.shape == (7, 3)


def test_pooled_and_last_axis_units() -> None:
    model, x = nn.Linear(4, 6), torch.randn(2, 3, 4)
    y = model(x).detach()
    with ActivationRecorder(model, "", unit_axis=None) as pooled:
        model(x)
    with ActivationRecorder(model, "", unit_axis=-1) as last:
        model(x)
    assert pooled[""][0].percentiles.shape == (3,)
    torch.testing.assert_close(pooled[""][0].moments.mean, y.mean())
    torch.testing.assert_close(last[""][0].moments.mean, y.mean((0, 1)))


def test_inputs_are_recorded_before_a_layer_that_works_in_place_overwrites_them() -> None:
    model, x = perceptron(), torch.randn(50, 6)
    with (
        ActivationRecorder(model, ["2"], of="input") as inputs,
        ActivationRecorder(model, ["1", "2"]) as outputs,
    ):
        model(x)
    assert (inputs["2"][0].percentiles[0] < 0).all()
    torch.testing.assert_close(inputs["2"][0].percentiles, outputs["1"][0].percentiles)
    assert (outputs["2"][0].percentiles[0] >= 0).all()


def test_nested_shared_and_repeated_layers_have_one_record_for_each_call() -> None:
    model, x = Odd(), torch.randn(8, 4)
    layers = ["block.inner.0", "alias", "block.inner", "unused", "head", ""]
    with ActivationRecorder(model, layers, samples=8) as recorder:
        model(x)
    assert {name: len(calls) for name, calls in recorder.records.items()} == {
        "block.inner.0": 4,  # three times as itself, once as its alias
        "alias": 4,
        "block.inner": 3,
        "unused": 0,
        "head": 1,
        "": 1,
    }
    for one, other in zip(recorder["alias"], recorder["block.inner.0"], strict=True):
        assert torch.equal(one.percentiles, other.percentiles)
    torch.testing.assert_close(recorder["head"][0].samples, 2 * recorder["alias"][3].samples)


def test_inputs_given_by_keyword_are_found() -> None:
    model, x = Odd(), torch.randn(8, 4)
    with ActivationRecorder(model, "head", of="input", samples=8) as recorder:
        output = model(x)
    torch.testing.assert_close(recorder["head"][0].samples, output["out"][1].detach())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_transformer_layer_can_be_watched(training: bool, grad: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    layers = ["", "linear1", "self_attn", "norm2"]
    with torch.set_grad_enabled(grad), ActivationRecorder(model, layers, unit_axis=-1) as recorder:
        y = model(x).detach()
    assert {name: len(calls) for name, calls in recorder.records.items()} == dict.fromkeys(
        layers, 1
    )
    torch.testing.assert_close(recorder[""][0].moments.mean, y.mean((0, 1)))
    assert recorder["linear1"][0].moments.mean.shape == (16,)
    assert recorder["self_attn"][0].shape == (3, 5, 8)


@pytest.mark.parametrize("make", [perceptron, Odd])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind_even_by_a_failing_call(make: Any, fails: bool) -> None:
    model = make()
    width = next(model.parameters()).shape[1]
    model.eval()
    before = everything(model)
    if fails:
        with pytest.raises(RuntimeError), ActivationRecorder(model, list(find_layers(model))):
            model(torch.zeros(8, width + 1))
    else:
        x = torch.linspace(-1, 1, 8 * width).view(8, width)
        with ActivationRecorder(model, list(find_layers(model)), samples=2) as seen:
            model(x)
        assert any(seen.records.values())
    assert_same(before, everything(model))


def test_watching_changes_neither_the_training_nor_its_random_numbers() -> None:
    watched, alone = perceptron(), perceptron()
    results = []
    for model in (watched, alone):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(20, 6)
            if model is watched:
                with ActivationRecorder(model, list(find_layers(model)), samples=3):
                    loss = model(x).square().mean()
            else:
                loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(everything(model))
    assert_same(*results)


def test_records_stand_apart_from_the_graph_and_from_later_changes() -> None:
    model, x = nn.Identity(), torch.ones(3, 2, requires_grad=True)
    with ActivationRecorder(model, "", samples=3) as recorder:
        model(x)
    with torch.no_grad():
        x.zero_()
    samples = recorder[""][0].samples
    assert samples is not None
    assert not samples.requires_grad
    assert samples.eq(1).all()


def test_recording_stops_and_goes_on() -> None:
    model, x = perceptron(), torch.randn(4, 6)
    recorder = ActivationRecorder(model, "0")
    model(x)
    recorder.remove()
    recorder.remove()
    model(x)
    assert len(recorder["0"]) == 1
    with recorder, recorder:
        model(x)
    assert len(recorder["0"]) == 2


def test_a_copy_made_while_recording_is_not_watched_after_removal() -> None:
    model, x = perceptron(), torch.randn(4, 6)
    with ActivationRecorder(model, "0") as recorder:
        model(x)
    twin = copy.deepcopy(model)
    twin(x)
    assert len(recorder["0"]) == 1


def test_half_precision_and_integers_are_recorded_in_float32() -> None:
    model = nn.Embedding(10, 4).to(torch.bfloat16)
    indices = torch.arange(10).view(5, 2)
    with (
        ActivationRecorder(model, "", unit_axis=-1) as out,
        ActivationRecorder(model, "", of="input") as inputs,
    ):
        model(indices)
    assert out[""][0].percentiles.dtype == torch.float32
    assert inputs[""][0].moments.mean.tolist() == [4.0, 5.0]


def test_unknown_layers_are_refused_with_the_list_of_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no layer '7'.*'0', '1', '2', '3', '4'"):
        ActivationRecorder(perceptron(), ["0", "7"])
    with pytest.raises(ValueError, match=r"no layer this Linear.*'0', '1'"):
        ActivationRecorder(perceptron(), nn.Linear(1, 1))
    with pytest.raises(TypeError, match="int: 3"):
        ActivationRecorder(perceptron(), [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="names no layer"):
        ActivationRecorder(perceptron(), [])
    with pytest.raises(KeyError, match=r"not recorded; recorded: '0'"):
        ActivationRecorder(perceptron(), "0")["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentiles": (15, 150)}, r"\[0, 100\].*150"),
        ({"of": "weights"}, r"'output' or 'input', got 'weights'"),
        ({"samples": -1}, r"got -1"),
    ],
)
def test_bad_options_are_refused_before_any_hook_is_placed(
    options: dict[str, Any], message: str
) -> None:
    model = perceptron()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        ActivationRecorder(model, "0", **options)
    assert_same(before, everything(model))


def test_what_cannot_be_recorded_is_said_at_the_call() -> None:
    model = perceptron()
    with (
        ActivationRecorder(model, "0", unit_axis=3),
        pytest.raises(ValueError, match=r"unit_axis=3.*'0'.*\(4, 5\)"),
    ):
        model(torch.randn(4, 6))

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    silent = Silent()
    with (
        ActivationRecorder(silent, ""),
        pytest.raises(TypeError, match="no tensor to record: it is a NoneType"),
    ):
        silent(torch.ones(1))
