"""The layer beside torch's own: values, gradients, running statistics, checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnlib import BatchNorm, PerActivationBatchNorm

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]


def pair(shape, dtype=torch.float64, **options):
    """Our layer and torch's, with the same parameters."""
    ours, theirs = BatchNorm(shape[1], **options), TORCH[len(shape)](shape[1], **options)
    if options.get("affine", True):
        for layer in (ours, theirs):
            nn.init.normal_(layer.weight, generator=torch.manual_seed(1))
            nn.init.normal_(layer.bias, generator=torch.manual_seed(2))
    return ours.to(dtype), theirs.to(dtype)


def assert_same_state(ours, theirs, **tolerance):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([0.1, 1.0, 0.0, None]),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(["train", "eval"]), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_history_of_training_and_evaluation_is_that_of_torch(
    shape, momentum, affine, track, modes, with_grad
):
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track}
    ours, theirs = pair(shape, eps=1e-3, **options)
    for step, mode in enumerate(modes):
        x = torch.randn(shape, generator=torch.manual_seed(step), dtype=torch.float64) * 3 + step
        grad_y = torch.randn(shape, dtype=torch.float64)
        results = []
        for layer in (ours, theirs):
            layer.train(mode == "train")
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.set_grad_enabled(with_grad):
                y = layer(leaf)
            results.append([y])
            if with_grad:
                y.backward(grad_y)
                results[-1] += [leaf.grad, *(p.grad for p in layer.parameters())]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_state_dicts_load_in_both_directions(affine, track):
    ours, theirs = pair((4, 3, 2, 2), affine=affine, track_running_stats=track)
    theirs(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs, rtol=0, atol=0)
    ours(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    theirs.load_state_dict(ours.state_dict())
    assert_same_state(ours, theirs, rtol=0, atol=0)


def test_a_checkpoint_from_before_num_batches_tracked_loads():
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"], old._metadata
    layer = BatchNorm(3)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


def test_running_statistics_keep_no_graph_alive():
    layer = BatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    for _ in range(3):
        layer(x * 2).sum().backward()  # a graph kept alive would be gone through a second time
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None
    assert layer.running_var.grad_fn is None


def test_the_mode_is_the_layers_own_and_not_the_gradient_mode():
    layer = BatchNorm(2)
    x = torch.randn(8, 2) * 5
    with torch.no_grad():
        y = layer(x)  # training
    torch.testing.assert_close(y.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    assert layer.num_batches_tracked == 1
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    y = layer(x.requires_grad_())  # evaluation, gradients enabled
    assert y.requires_grad
    assert y.std() > 2
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16"])
def test_conversion_to_another_precision_is_that_of_torch(convert):
    ours, theirs = pair((16, 3, 5), torch.float32)
    ours, theirs = getattr(ours, convert)(), getattr(theirs, convert)()
    x = getattr(torch.randn(16, 3, 5) * 2 + 1, convert)()
    tolerance = {"double": 1e-12, "half": 4e-3, "bfloat16": 3e-2}[convert]
    for mode in (True, False):
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        assert a.dtype == b.dtype == x.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert_same_state(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_float32_layer_takes_half_precision_activations():
    ours, theirs = pair((16, 3, 5), torch.float32)
    x = torch.randn(16, 3, 5).bfloat16()
    for mode in (True, False):
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: BatchNorm(3), lambda: PerActivationBatchNorm((3, 2))])
def test_copies_pickles_and_saved_layers_behave_like_the_original(make):
    layer = make()
    x = torch.randn(5, 3, 2)
    layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ]
    want = layer(x)
    for other in copies:
        assert torch.equal(other(x), want)
        assert_same_state(other, layer, rtol=0, atol=0)
        assert other.weight is not layer.weight


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_without_graph_breaks_it_trains_and_evaluates_alike(momentum):
    eager = BatchNorm(3, momentum=momentum)
    compiled = copy.deepcopy(eager)
    # this backend captures what the default one does and needs no C++ compiler
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = torch.randn(4, 3, 6, generator=torch.manual_seed(step)) + 2
        torch.testing.assert_close(run(x), eager(x), rtol=1e-4, atol=1e-5)
    assert_same_state(compiled, eager, rtol=1e-4, atol=1e-5)
    compiled.eval()
    eager.eval()
    torch.testing.assert_close(run(x), eager(x), rtol=1e-4, atol=1e-5)


def test_per_activation_is_torchs_one_dimensional_layer_on_flattened_examples():
    ours, theirs = PerActivationBatchNorm((3, 4, 2)), nn.BatchNorm1d(24)
    gamma, beta = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    ours.load_state_dict({**ours.state_dict(), "weight": gamma, "bias": beta})
    theirs.load_state_dict(
        {**theirs.state_dict(), "weight": gamma.flatten(), "bias": beta.flatten()}
    )
    assert ours.weight.shape == ours.running_mean.shape == (3, 4, 2)
    for mode in (True, False):
        x = torch.randn(6, 3, 4, 2)
        y = ours.train(mode)(x)
        torch.testing.assert_close(y, theirs.train(mode)(x.flatten(1)).view_as(x))
    torch.testing.assert_close(ours.running_mean.flatten(), theirs.running_mean)
    torch.testing.assert_close(ours.running_var.flatten(), theirs.running_var)


def test_per_activation_gradients_reach_its_own_parameters():
    layer = PerActivationBatchNorm((3, 2)).double()
    x, grad_y = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    layer(x.requires_grad_()).backward(grad_y)
    torch.testing.assert_close(layer.bias.grad, grad_y.sum(0))
    x_hat = (x - x.mean(0)) * (x.var(0, correction=0) + layer.eps).rsqrt()
    torch.testing.assert_close(layer.weight.grad, (grad_y * x_hat).sum(0).detach())
    bare = PerActivationBatchNorm(4, affine=False, track_running_stats=False)
    assert not bare.state_dict()
    assert bare(torch.randn(3, 4)).shape == (3, 4)


def test_an_empty_batch_leaves_the_statistics_as_they_are():
    layer = BatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.randn(0, 3, 2)).shape == (0, 3, 2)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_refused_batch_leaves_the_statistics_as_they_are():
    layer = BatchNorm(3)
    with pytest.raises(ValueError, match="single value in each channel"):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.randn(1, 3))  # which inference does not mind


def test_bad_arguments_and_inputs_are_named():
    with pytest.raises(ValueError, match=r"4 channels.*num_features=3"):
        BatchNorm(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"feature_shape=\(3, 4\).*shape \(N, 3, 4\)"):
        PerActivationBatchNorm((3, 4))(torch.randn(2, 3))
    with pytest.raises(TypeError, match="int64"):
        BatchNorm(3)(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="eps is 0"):
        BatchNorm(3, eps=0)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        BatchNorm(3, momentum=1.5)
    with pytest.raises(ValueError, match="num_features is -1"):
        BatchNorm(-1)
    with pytest.raises(ValueError, match=r"feature_shape is \(\)"):
        PerActivationBatchNorm(())
    layer = BatchNorm(3).eval()
    layer.running_var[1] = -1
    with pytest.raises(ValueError, match="var of channel 1 is -1"):
        layer(torch.randn(2, 3))


def test_tools_that_look_for_batch_normalization_find_it():
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4))
    batches = [torch.randn(8, 3) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert model[1].num_batches_tracked == 3
    assert repr(BatchNorm(3)).startswith("BatchNorm(3, eps=1e-05")
    assert repr(PerActivationBatchNorm((3, 2))).startswith("PerActivationBatchNorm((3, 2), eps")
