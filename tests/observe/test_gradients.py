"""Gradients, Jacobians and the gradient-based shift against direct computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from untouched import assert_same, everything

from bnlib.modules import BatchNorm
from bnlib.observe.gradients import (
    activation_gradients,
    gradient_norms,
    gradient_shift,
    layer_jacobian,
    snapshot,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(normalization: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), normalization(6), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(6, 3)
    ).double()


def transformer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).double()


def test_gradient_norms_are_those_that_backward_leaves() -> None:
    model, x = transformer(), torch.randn(3, 5, 8, dtype=torch.float64)
    loss = model(x).pow(3).mean()
    before = everything(model)
    got = gradient_norms(loss, model)
    named = gradient_norms(loss, model, ["self_attn", model.norm2])
    assert_same(before, everything(model))
    loss.backward()
    for name, norm in got.items():
        own = model.get_submodule(name).parameters(recurse=False)
        want = math.sqrt(sum(float(p.grad.square().sum()) for p in own))
        assert norm == pytest.approx(want, rel=1e-9)
        assert norm > 0
    whole = math.sqrt(got["self_attn"] ** 2 + got["self_attn.out_proj"] ** 2)
    assert named == pytest.approx({"self_attn": whole, "norm2": got["norm2"]})


def test_a_layer_that_the_loss_does_not_depend_on_has_a_gradient_norm_of_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    loss = model["used"](torch.ones(1, 2)).sum()
    assert gradient_norms(loss, model)["idle"] == 0
    assert gradient_norms(loss, model)["used"] > 0


def test_activation_gradients_are_those_of_retained_tensors_even_before_an_inplace_layer() -> None:
    model, x = network(), torch.randn(7, 4, dtype=torch.float64)
    model[3].p = 0.0
    got = activation_gradients(model, ["1", "4", "0"], lambda: model(x).pow(2).sum())
    hidden = model[0](x)
    normal = model[1](hidden)
    output = model[4](normal.relu())
    want = torch.autograd.grad(output.pow(2).sum(), [normal, output, hidden])
    for (gradient,), expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert expected.abs().max() > 0


def test_activation_gradients_come_one_for_each_call() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(2, 3)
    first, second = activation_gradients(model, "0", lambda: model(x).sum())["0"]
    assert torch.equal(second, torch.ones(2, 3))
    want = second @ layer.weight * (1 - torch.tanh(layer(x)).square())
    torch.testing.assert_close(first, want.detach())
    idle = activation_gradients(model, "0", lambda: model[1](layer(x).detach() + layer(x)).sum())
    assert idle["0"][0].eq(0).all()
    assert idle["0"][1].abs().min() > 0


def test_activation_gradients_leave_no_hook_even_when_the_loss_fails() -> None:
    model = network()
    before = everything(model)
    with pytest.raises(ZeroDivisionError):
        activation_gradients(model, "0", lambda: torch.ones(1) / (1 // 0))
    with pytest.raises(ValueError, match="without calling layer '0'"):
        activation_gradients(model, "0", lambda: torch.ones(1, requires_grad=True))
    with torch.no_grad(), pytest.raises(ValueError, match="'0' carries no gradient"):
        activation_gradients(model, "0", lambda: model(torch.ones(2, 4).double()).sum())
    after = everything(model)
    assert_same(before, after)


def test_the_jacobian_of_a_linear_layer_is_its_weight() -> None:
    layer = nn.Linear(4, 3)
    assert torch.equal(layer_jacobian(layer, torch.randn(1, 4)), layer.weight.detach())


def test_the_jacobian_agrees_with_torch_func_on_a_transformer() -> None:
    model = transformer().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    want = torch.func.jacrev(lambda one: model(one.unsqueeze(0))[0])(x[1])
    torch.testing.assert_close(layer_jacobian(model, x, index=-1), want.reshape(40, 40))


@pytest.mark.parametrize("normalization", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_the_jacobian_of_batch_norm_lets_the_batch_move_only_in_training_mode(
    normalization: Callable[[int], nn.Module], training: bool
) -> None:
    layer = normalization(3).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    layer(3 * x)
    layer.train(training)
    assert isinstance(layer.running_var, Tensor)
    inv_std = (layer.running_var + layer.eps).rsqrt().clone()
    if training:
        inv_std = (x.var(0, correction=0) + layer.eps).rsqrt()
        x_hat = (x[2] - x.mean(0)) * inv_std
        # From the compact derivative of section 3, for the example itself.
        want = inv_std * (1 - 1 / 6 - x_hat.square() / 6)
    else:
        want = inv_std
    before = everything(layer)
    got = layer_jacobian(layer, x, index=2)
    assert_same(before, everything(layer))
    torch.testing.assert_close(got, want.diag())


def test_the_jacobian_leaves_gradients_dropout_and_running_averages_alone() -> None:
    model, x = network(), torch.randn(5, 4, dtype=torch.float64)
    model(x).sum().backward()
    before = everything(model)
    with torch.no_grad():
        assert layer_jacobian(model, x, 1).shape == (3, 4)
    assert_same(before, everything(model))


def shift_by_hand(model: nn.Module, x: Tensor, after: dict[str, Tensor], layer: str) -> Tensor:
    """G' on a twin that mixes the two snapshots."""
    mixed = snapshot(model)
    for name in mixed:
        if int(name[0]) < int(layer):
            mixed[name] = after[name]
    weights = {n: p.clone().requires_grad_() for n, p in mixed.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = torch.func.functional_call(model, {**weights, **buffers}, (x,)).pow(2).mean()
    own = [weights[n] for n in weights if n.startswith(layer)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)])


def test_the_shift_is_the_change_of_the_gradient_when_only_earlier_layers_move() -> None:
    model, x = network(), torch.randn(9, 4, dtype=torch.float64)
    model[3].p = 0.0
    before = snapshot(model)
    after = {name: value + 0.1 * torch.randn_like(value) for name, value in before.items()}
    untouched = everything(model)
    got = gradient_shift(model, before, after, lambda: model(x).pow(2).mean())
    assert_same(untouched, everything(model))
    assert list(got) == ["0", "1", "4"]
    assert got["0"].distance == 0
    assert got["0"].cosine == pytest.approx(1, abs=1e-12)
    for layer in ("1", "4"):
        g = shift_by_hand(model, x, before, layer)
        moved = shift_by_hand(model, x, after, layer)
        assert got[layer].distance == pytest.approx(float((g - moved).norm()), rel=1e-9)
        cosine = torch.nn.functional.cosine_similarity(g, moved, dim=0)
        assert got[layer].cosine == pytest.approx(float(cosine), rel=1e-9)
        assert got[layer].norm == pytest.approx(float(g.norm()), rel=1e-9)
        assert got[layer].distance > 1e-3


def test_without_a_step_there_is_no_shift_though_dropout_draws_and_averages_run() -> None:
    model, x = network(BatchNorm), torch.randn(9, 4, dtype=torch.float64)
    model[3].p = 0.5
    before = snapshot(model)
    for shift in gradient_shift(model, before, before, lambda: model(x).pow(2).mean()).values():
        assert shift.distance == 0
        assert shift.cosine == pytest.approx(1, abs=1e-12)


def test_the_shift_of_a_transformer_may_be_asked_block_by_block() -> None:
    model = nn.Sequential(transformer(), transformer(), nn.Linear(8, 1).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = snapshot(model)
    after = {name: value * 1.01 for name, value in before.items()}
    untouched = everything(model)
    got = gradient_shift(model, before, after, lambda: model(x).square().mean(), ["0", "1", "2"])
    assert_same(untouched, everything(model))
    assert got["0"].distance == 0
    assert got["1"].distance > 0
    assert got["2"].distance > 0


def test_a_failing_loss_still_leaves_the_parameters_as_they_were() -> None:
    model = network()
    untouched = everything(model)
    zeros = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    with pytest.raises(RuntimeError):
        gradient_shift(model, zeros, zeros, lambda: model(torch.ones(2, 9)).sum())
    assert_same(untouched, everything(model))


def test_bad_input_is_refused_by_name() -> None:
    model, x = network(), torch.randn(5, 4, dtype=torch.float64)
    values = snapshot(model)

    def loss() -> Tensor:
        return model(x).sum()

    with pytest.raises(ValueError, match=r"scalar, got the shape \(5, 3\)"):
        gradient_norms(model(x), model)
    with pytest.raises(ValueError, match="'2' has no trainable parameter"):
        gradient_norms(loss(), model, ["2"])
    with pytest.raises(ValueError, match=r"no layer 'x'.*'0', '1'"):
        gradient_norms(loss(), model, "x")
    missing = {name: value for name, value in values.items() if name != "4.bias"}
    with pytest.raises(ValueError, match=r"after does not fit.*'4.bias'"):
        gradient_shift(model, values, missing, loss)
    with pytest.raises(ValueError, match=r"share the parameter '0.weight'"):
        gradient_shift(model, values, values, loss, ["", "0"])
    with pytest.raises(ValueError, match=r"example 5; its shape is \(5, 4\)"):
        layer_jacobian(model, x, 5)
    with pytest.raises(TypeError, match="int64"):
        layer_jacobian(model, torch.ones(2, 4, dtype=torch.int64))


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    loss = model(torch.randn(5, 4, dtype=torch.float64)).sum()
    assert list(gradient_norms(loss, model)) == ["1", "4"]
