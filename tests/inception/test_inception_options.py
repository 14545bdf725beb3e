"""Every option of the network, its initial weights, and what it refuses."""

import copy
import math

import pytest
import torch
from inception_networks import maps_at, narrow, random_images
from normalization import settle
from torch import nn
from torch.testing import assert_close

from bnlib import PerActivationBatchNorm, bn_inception


def test_local_response_normalization_stands_in_the_stem():
    model, plain = settle(narrow(lrn=True)), settle(narrow())
    plain.load_state_dict(model.state_dict())
    x = random_images(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps, without = model.feature_maps(x), plain.feature_maps(x)
        assert torch.equal(maps[0], without[0])
        lrn = nn.LocalResponseNorm(5, 1e-4, 0.75)
        stem = plain.conv2(plain.conv2_reduce(lrn(plain.pool1(without[0]))))
        assert_close(maps[1], lrn(stem), rtol=1e-6, atol=1e-6)
    assert not torch.equal(maps[1], without[1])


def test_dropout_acts_on_the_features_in_training_only(network):
    model = copy.deepcopy(network)
    model.dropout = narrow(dropout=0.5).dropout.eval()
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = random_images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), network(x))
        model.dropout.train()
        model(x)
    kept, dropped = seen
    zeros = (dropped == 0) & (kept != 0)
    assert 0.4 < zeros.double().mean() / (kept != 0).double().mean() < 0.6
    torch.testing.assert_close(dropped[~zeros], 2 * kept[~zeros])


@pytest.mark.parametrize("size", [64, (65, 100)])
def test_per_activation_normalization_in_the_last_module(size):
    model = narrow(normalization="per-activation-last", image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    last = maps_at(height)[-1], maps_at(width)[-1]
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, PerActivationBatchNorm)}
    assert len(kinds) == 7
    assert all(n.startswith("inception.5b.") for n in kinds)
    assert {m.feature_shape[1:] for m in kinds.values()} == {last}
    model(random_images(3, 3, height, width)).square().sum().backward()
    with pytest.raises(ValueError, match="shape"):
        model(random_images(3, 3, height + 64, width + 64))


def test_network_without_normalization_has_no_statistics_and_biases():
    model = narrow(normalization="none")
    assert not list(model.buffers())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    x = random_images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))
    unbiased = narrow(normalization="none", conv_bias=False)
    assert all(m.bias is None for m in unbiased.modules() if isinstance(m, nn.Conv2d))


def test_sigmoid_replaces_every_activation():
    model = narrow(activation="sigmoid")
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Sigmoid) == 69
    assert nn.ReLU not in kinds
    maps = model.feature_maps(random_images(2, 3, 64, 64))
    assert all(m.min() > 0 and m.max() < 1 for m in maps)


def test_normalization_comes_between_convolution_and_activation(network):
    seen = []
    layer = network.conv2
    handles = [
        m.register_forward_hook(lambda m, *_: seen.append(type(m))) for m in layer.children()
    ]
    with torch.no_grad():
        network(random_images(1, 3, 32, 32, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]) == 69


def test_one_channel_and_separable_stem():
    model = bn_inception(in_chans=1, stem="separable", num_classes=10).eval()
    depthwise, pointwise = model.conv1.conv
    assert depthwise.weight.shape == (8, 1, 7, 7)
    assert pointwise.weight.shape == (64, 8, 1, 1)
    colour = bn_inception(stem="separable").conv1.conv[0]
    assert (colour.groups, colour.out_channels) == (3, 24)
    assert model(random_images(2, 1, 64, 64)).shape == (2, 10)


def test_global_pools(network):
    x = random_images(2, 3, 96, 96, dtype=torch.float64)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    results = {}
    for pool in ("avg", "max", "none"):
        model = narrow(num_classes=0, global_pool=pool).double().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            results[pool] = model(x)
    assert results["none"].shape == (2, 256, 3, 3)
    torch.testing.assert_close(results["avg"], results["none"].mean((2, 3)), rtol=1e-12, atol=0)
    assert torch.equal(results["max"], results["none"].amax((2, 3)))


def test_epsilon_reaches_every_normalization():
    model = narrow(eps=1e-3, normalization="per-activation-last")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 69
    assert {m.eps for m in norms} == {1e-3}


# Initialization


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({}, 2),
        ({"activation": "sigmoid"}, 1),
        ({"init_scale": 1.5, "stem": "separable", "conv_bias": True}, 2 * 1.5**2),
        ({"normalization": "none"}, 2),
    ],
)
def test_initial_weights_have_the_stated_deviation(options, gain):
    torch.manual_seed(0)
    model = bn_inception(**options)
    kinds = {nn.Conv2d: 0, nn.Linear: 0, nn.BatchNorm2d: 0}
    for name, module in model.named_modules():
        if type(module) not in kinds:
            continue
        kinds[type(module)] += 1
        weight = module.weight.detach().double()
        if isinstance(module, nn.BatchNorm2d):
            assert (weight == 1).all()
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
        else:
            linear = isinstance(module, nn.Linear)
            std = 0.01 if linear else math.sqrt(gain / weight[0].numel())
            n = weight.numel()
            # Six standard errors of a normal sample's deviation, mean and share beyond 2 sigma.
            assert abs(weight.std() / std - 1) < 6 / math.sqrt(2 * n), name
            assert abs(weight.mean() / std) < 6 / math.sqrt(n), name
            beyond = (weight.abs() > 2 * std).double().mean()
            assert abs(beyond - 0.0455) < 6 * math.sqrt(0.0455 / n), name
        assert module.bias is None or (module.bias == 0).all(), name
    assert kinds[nn.Conv2d] >= 69
    assert kinds[nn.Linear] == 1
    assert kinds[nn.BatchNorm2d] == (0 if "normalization" in options else 69)


def test_equal_seeds_give_equal_networks():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(narrow())
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)
    models[1].reset_parameters()
    assert not torch.equal(models[0].conv1.conv.weight, models[1].conv1.conv.weight)


def test_new_parameters_have_the_deviation_of_the_first():
    model = narrow(activation="sigmoid", init_scale=3.0)
    first = model.conv2.conv.weight.std().item()
    model.reset_parameters()
    assert model.conv2.conv.weight.std().item() == pytest.approx(first, rel=0.1)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_proj_4cd": 64}, r"pool_proj_4cd is 64; .* \(96, 128\)"),
        ({"stem": "patch"}, r"stem is 'patch'; .*'plain', 'separable'"),
        ({"normalization": "layer"}, r"normalization is 'layer'; .*'none', 'per-activation-last'"),
        ({"activation": "gelu"}, r"activation is 'gelu'; .*'relu', 'sigmoid'"),
        ({"global_pool": "sum"}, r"global_pool is 'sum'; .*'avg', 'max', 'none'"),
        ({"global_pool": "none"}, r"global_pool='none'.*set num_classes=0 \(it is 1000\)"),
        ({"num_classes": -1}, r"num_classes is -1; .*at least 0"),
        ({"in_chans": 0}, r"in_chans is 0; .*at least 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0; .*from 0 to below 1"),
        ({"dropout": -0.1}, r"dropout is -0\.1; .*from 0 to below 1"),
        ({"image_size": 31}, r"image_size is 31; .*at least 32"),
        ({"image_size": (64, 16)}, r"image_size is \(64, 16\); .*at least 32"),
        ({"stem_stride": 2}, r"stem_stride is 2; it must be one of \(8, 4\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bn_inception(**options)


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(TypeError, match=r"\['classes', 'depth'\].*'num_classes'.*'stem'"):
        bn_inception(classes=10, depth=2)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"\[3, 64, 64\]; .*\(N, 3, H, W\).*images\[None\]"),
        (torch.zeros(1, 64, 64, 3), ValueError, r"have 64 channels on axis 1.*made for 3"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"have 1 channels.*made for 3 \(in_chans\)"),
        (torch.zeros(1, 3, 31, 64), ValueError, r"\[1, 3, 31, 64\].*at least 32.*Enlarge"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"torch\.uint8.*floating-point"),
    ],
)
def test_images_that_do_not_fit_are_refused(network, x, kind, message):
    with pytest.raises(kind, match=message):
        network(x)
