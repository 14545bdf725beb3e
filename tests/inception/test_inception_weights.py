"""Weights in the pretrainedmodels port's layout: the same function, and back again."""

import copy

import pytest
import torch
from inception_port import Port
from normalization import settle
from torch import nn

from bnlib import BNInception, bn_inception, fold_batch_norm
from bnlib.inception import load_cadene, to_cadene


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def assert_near(ours, theirs, tolerance=1e-11):
    """Equal up to rounding, as measured against the largest value."""
    scale = theirs.abs().max()
    assert scale > 0
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * scale


def port_for(size):
    """A copy of the port's class whose global pooling covers the last map of smaller images."""
    other = settle(Port())
    other.global_pool = nn.AvgPool2d(size // 32)
    return other


def test_state_dicts_have_the_same_keys_in_the_same_order(port):
    ours = to_cadene(load_cadene(port.state_dict()))
    assert list(ours) == list(port.state_dict())


def test_there_and_back_is_the_identity(port):
    model = load_cadene(port.state_dict())
    back = to_cadene(model)
    for name, value in port.state_dict().items():
        assert torch.equal(back[name], value), name
        assert back[name].data_ptr() != value.data_ptr()
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    other = Port().double()
    other.load_state_dict(back)  # strict
    assert torch.equal(other.inception_4d_pool_proj.weight, port.inception_4d_pool_proj.weight)


def test_evaluation_equals_the_port_at_224(port):
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        expected = port(x)
        assert_near(load_cadene(port.state_dict())(x), expected)
        assert_near(load_cadene(port.state_dict(), conv_bias=False)(x), expected)
        assert_near(fold_batch_norm(load_cadene(port.state_dict()))(x), expected)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (69, 67)])
def test_feature_maps_equal_the_port_at_other_sizes(port, size):
    # Sizes whose maps before 3c and 4e are even: on others the port cannot concatenate.
    x = images(2, 3, *size)
    with torch.no_grad():
        ours = load_cadene(port.state_dict(), num_classes=0, global_pool="none")(x)
        assert_near(ours, port.features(x))


def test_whole_network_equals_the_port_at_another_size_it_takes(port):
    x = images(1, 3, 229, 223)
    with torch.no_grad():
        assert_near(load_cadene(port.state_dict())(x), port(x))


def test_port_fails_on_odd_maps_where_we_do_not(port):
    x = images(1, 3, 104, 104)  # 13 x 13 before 3c
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            port.features(x)
        assert load_cadene(port.state_dict())(x).shape == (1, 1000)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (96, {}),  # last map 3 x 3
        (64, {"conv_bias": False}),  # 2 x 2
    ],
)
def test_training_step_equals_the_port(size, options):
    theirs = port_for(size).train()
    ours = load_cadene(theirs.state_dict(), **options).train()
    x, weights = images(4, 3, size, size), images(1000)
    expected, found = theirs(x), ours(x)
    assert_near(found, expected, 1e-10)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()

    gradients = copy.deepcopy(ours)
    for p, q in zip(gradients.parameters(), ours.parameters(), strict=True):
        p.data = q.grad
    found = to_cadene(gradients)
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        layer, tensor = name.rsplit(".", 1)
        if tensor == "bias" and f"{layer}_bn.weight" in found:
            # Normalization removes this bias, so that its gradient is zero up to rounding.
            assert p.grad.abs().max() <= 1e-10 * largest, name
            assert found[name].abs().max() <= 1e-10 * largest, name
        else:
            assert_near(found[name], p.grad, 1e-8)

    after = to_cadene(ours)
    for name, value in theirs.state_dict().items():
        layer, tensor = name.rsplit(".", 1)
        if tensor == "num_batches_tracked":
            assert value == after[name] == 1
        elif tensor in ("running_mean", "running_var"):
            if tensor == "running_mean" and "conv_bias" in options:
                value = value - theirs.state_dict()[f"{layer.removesuffix('_bn')}.bias"]
            assert_near(after[name], value, 1e-10)


def test_conv_biases_fold_into_the_means_and_back_as_zeros(port):
    model = load_cadene(port.state_dict(), conv_bias=False)
    with_bias = load_cadene(port.state_dict())
    count = sum(p.numel() for p in with_bias.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    assert count == 10_016
    back = to_cadene(model)
    name = "inception_4a_3x3"
    assert not back[f"{name}.bias"].any()
    expected = port.inception_4a_3x3_bn.running_mean - port.inception_4a_3x3.bias
    assert torch.equal(back[f"{name}_bn.running_mean"], expected)
    other = Port().double().eval()
    other.load_state_dict(back)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(other.features(x), port.features(x))


def test_loading_copies_and_draws_no_random_numbers(small):
    before = {name: value.clone() for name, value in small.items()}
    state = torch.get_rng_state()
    for options in ({}, {"conv_bias": False}):
        model = load_cadene(small, **options)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in small.items():
        assert torch.equal(value, before[name])


def test_options_that_the_weights_leave_open(small):
    features = load_cadene(small, num_classes=0)
    assert features(images(1, 3, 64, 64, dtype=torch.float32)).shape == (1, 1024)
    headless = {k: v for k, v in small.items() if not k.startswith("last_linear")}
    assert load_cadene(headless, num_classes=0).num_features == 1024
    maps = load_cadene(headless, features_only=True)(images(1, 3, 64, 64, dtype=torch.float32))
    assert [m.shape[1] for m in maps] == [64, 192, 320, 608, 1024]
    assert load_cadene(small, dropout=0.4).dropout.p == 0.4
    assert load_cadene(small, num_classes=10).fc.out_features == 10
    assert isinstance(load_cadene(small, global_pool="max").global_pool[0], nn.AdaptiveMaxPool2d)


def test_channels_follow_the_first_convolution():
    model = bn_inception(in_chans=10, num_classes=4, pool_proj_4cd=128, conv_bias=True)
    back = load_cadene(to_cadene(model))
    assert back.images.channels == 10
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


@pytest.mark.parametrize("option", [{"stem": "separable"}, {"eps": 1e-3}, {"colour": 1}])
def test_options_fixed_by_the_weights_are_refused(small, option):
    with pytest.raises(TypeError, match=f"{next(iter(option))}.*conv_bias.*dropout"):
        load_cadene(small, **option)


def test_another_number_of_classes_is_refused_with_the_remedy(small):
    with pytest.raises(ValueError, match=r"num_classes is 7.*has 10 classes.*model\.fc"):
        load_cadene(small, num_classes=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_proj_4cd": 96}, r"inception\.4c\.projection\.conv\.weight.*\[96, 576, 1, 1\]"),
        ({"stem": "separable"}, r"missing: conv1\.conv\.weight"),
        ({"normalization": "none"}, r"missing: conv1\.norm\.weight"),
        ({"normalization": "per-activation-last"}, r"inception\.5b\.conv1x1\.norm\.weight"),
        ({"num_classes": 0}, r"missing: fc\.weight"),
        ({"features_only": True}, r"missing: fc\.weight"),
        ({"activation": "sigmoid"}, "Sigmoid"),
        ({"lrn": True}, "LocalResponseNorm"),
        ({"global_pool": "max"}, "AdaptiveMaxPool2d"),
        ({"eps": 1e-3}, r"eps: \[0\.001\]"),
    ],
)
def test_what_the_port_cannot_compute_is_not_written(options, message):
    model = BNInception(**{"pool_proj_4cd": 128, "image_size": 64, **options})
    with pytest.raises(ValueError, match=f"(?s){message}.*pool_proj_4cd=128"):
        to_cadene(model)


def test_folded_and_foreign_models_are_not_written():
    with pytest.raises(ValueError, match="not yet folded"):
        to_cadene(fold_batch_norm(bn_inception(pool_proj_4cd=128)))
    with pytest.raises(TypeError, match="Linear"):
        to_cadene(nn.Linear(1, 1))
