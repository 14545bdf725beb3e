"""Folding: the outputs stay, batch normalization goes; where that is not so, it is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normalization import settle
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from bnlib import BatchNorm, PerActivationBatchNorm, fold_batch_norm

KINDS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def assert_folds(model, x, left=0):
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model, strict=left == 0)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    assert len(norms(folded)) == left
    assert type(folded) is type(model)
    assert not any(m.training for m in folded.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    return folded


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["ours", "torch"]),
)
def test_every_convolution_takes_over(dims, transposed, bias, groups, affine, depthwise, kind):
    conv = KINDS[dims][1 if transposed else 0]
    norm = BatchNorm if kind == "ours" else KINDS[dims][2]
    channels = 4 if depthwise else 8
    model = settle(
        nn.Sequential(
            conv(4, channels, 3, stride=2, padding=1, groups=groups, bias=bias),
            norm(channels, affine=affine, eps=1e-3),
            nn.ReLU(),
        )
    )
    folded = assert_folds(model, torch.randn(2, 4, *[7] * dims, dtype=torch.float64))
    assert [type(m) for m in folded] == [conv, nn.Identity, nn.ReLU]
    assert folded[0].bias is not None


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm1d, PerActivationBatchNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_takes_over(norm, bias):
    model = settle(nn.Sequential(nn.Linear(3, 5, bias=bias), norm(5), nn.Sigmoid()))
    assert_folds(model, torch.randn(4, 3, dtype=torch.float64))


class Branches(nn.Module):
    """Concatenated branches, a residual path, a functional and a nested block, all foldable."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": BatchNorm(4)})
        self.left = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), BatchNorm(3))
        self.classify, self.last = nn.Linear(5, 6), BatchNorm(6)

    def forward(self, x, scale=1.0):
        x = torch.relu(self.stem["bn"](self.stem["conv"](x)))
        both = torch.cat([self.left(x), torch.relu(self.right(x))], 1) * scale
        if self.training:
            raise AssertionError("the forward pass is read in evaluation mode")
        both = both + torch.nn.functional.avg_pool2d(both, 3, 1, 1)
        return self.last(self.classify(both.mean((2, 3))))


def test_branches_concatenation_and_functional_code_fold():
    model = settle(Branches())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = assert_folds(model.train(), x)
    assert isinstance(folded.stem["bn"], nn.Identity)
    assert set(folded.state_dict()) < set(model.state_dict()) | {"stem.conv.bias"}


def test_float32_and_half_weights_are_rounded_once():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm(8)))
    exact = fold_batch_norm(model)[0]
    for dtype in (torch.float32, torch.bfloat16):
        folded = fold_batch_norm(model.to(dtype))[0]
        assert folded.weight.dtype == folded.bias.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            folded.weight.double(), exact.weight, rtol=4 * tolerance, atol=tolerance
        )


class Reused(nn.Module):
    """A forward pass in which something else depends on what folding would change."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn = nn.Conv1d(3, 3, 1), BatchNorm(3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "output":
            return self.bn(y) + y
        if self.how == "conv twice":
            return self.bn(y) + self.conv(x + 1)
        if self.how == "norm twice":
            return self.bn(y) + self.bn(x)
        if self.how == "weight":
            return self.bn(y) + torch.nn.functional.conv1d(x, self.conv.weight)
        if self.how == "statistics":
            return self.bn(y) + self.bn.running_mean[:, None]
        return self.bn(torch.relu(y))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("output", r"bn: the output of conv goes elsewhere too"),
        ("conv twice", r"bn: conv is used 2 times"),
        ("norm twice", r"bn: it is used 2 times"),
        ("weight", r"bn: the forward pass reads parameters of conv by itself"),
        ("statistics", r"bn: the forward pass reads parameters of it by itself"),
        ("relu", r"bn: its input comes from .*relu.*, not from a plain Linear or convolution"),
    ],
)
def test_a_layer_on_which_something_else_depends_is_refused_or_left(how, message):
    model = settle(Reused(how))
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(model)
    assert_folds(model, torch.randn(2, 3, 4, dtype=torch.float64), left=1)


class WithActivation(nn.BatchNorm1d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def hooked():
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4))
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), WithActivation(4)), "a forward of its own"),
        (hooked(), "0 has hooks"),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), BatchNorm(4)),
            r"comes from 0 \(ParametrizedLinear\)",
        ),
        (nn.Sequential(BatchNorm(3), nn.Linear(3, 4)), "0: its input comes from input"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(), BatchNorm(4)), r"comes from 1 \(Dropout\)"),
    ],
)
def test_layers_that_do_more_or_stand_elsewhere_are_refused_or_left(model, message):
    model = settle(model)
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(model)
    assert_folds(model, torch.randn(4, 3, dtype=torch.float64), left=1)


def test_per_activation_after_a_convolution_has_no_place_in_its_weights():
    model = settle(nn.Sequential(nn.Conv1d(2, 3, 1), PerActivationBatchNorm((3, 4))))
    with pytest.raises(ValueError, match="for each pixel"):
        fold_batch_norm(model)
    assert_folds(model, torch.randn(2, 2, 4, dtype=torch.float64), left=1)


def test_a_weight_shared_with_another_layer_stays_what_it_was_there():
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert_folds(settle(model), torch.randn(4, 3, dtype=torch.float64))


def test_a_layer_registered_under_two_names_is_replaced_under_both():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(3, 4), BatchNorm(4)
            self.alias = self.bn
            self.norms = nn.ModuleList([self.bn])

        def forward(self, x):
            return self.alias(self.linear(x))

    folded = assert_folds(settle(Aliased()), torch.randn(4, 3, dtype=torch.float64))
    assert isinstance(folded.bn, nn.Identity)
    assert isinstance(folded.norms[0], nn.Identity)


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class Gate(nn.Module):
    """Control flow on values, in a module that holds nothing to fold."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_control_flow_on_values_is_refused_by_name_unless_nothing_is_inside():
    with pytest.raises(ValueError, match=r"cannot follow the forward pass of layer 0 \(Looks\)"):
        fold_batch_norm(nn.Sequential(Looks(), nn.Linear(3, 3), BatchNorm(3)))
    model = settle(nn.Sequential(Gate(), nn.Linear(3, 3), BatchNorm(3)))
    assert_folds(model, torch.randn(4, 3, dtype=torch.float64))


def test_statistics_that_cannot_be_folded_are_refused_by_layer():
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4, track_running_stats=False))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"layer '1' .*track_running_stats=True"):
            fold_batch_norm(model, strict=strict)
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4))
    model[1].running_var[2] = float("nan")
    with pytest.raises(ValueError, match="layer '1': var of channel 2 is nan"):
        fold_batch_norm(model)
    with pytest.raises(ValueError, match="no batch-normalization layer"):
        fold_batch_norm(nn.Linear(3, 4))
