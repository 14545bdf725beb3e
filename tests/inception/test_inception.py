"""The network: Figure 5's arithmetic, and every size of image."""

import math

import pytest
import torch
from inception_networks import maps_at, narrow, random_images
from torch import nn

from bnlib import BNInception, bn_inception
from bnlib.inception.layers import StridedMaxPool
from bnlib.inception.table import FIGURE5, MODULES, repaired

SIZES = [(32, 32), (33, 33), (65, 65), (100, 100), (216, 216), (224, 224), (64, 101)]


def count(model):
    return sum(p.numel() for p in model.parameters())


# The count of parameters, and the table


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 11_194_984),
        ({"pool_proj_4cd": 128, "conv_bias": True}, 11_295_240),  # what the ports have
        ({"pool_proj_4cd": 128}, 11_285_224),
        ({"stem": "separable"}, 11_194_984 - 6_696),
        ({"num_classes": 0}, 11_194_984 - 1_025_000),
        ({"features_only": True}, 11_194_984 - 1_025_000),
        ({"in_chans": 1}, 11_194_984 - 2 * 64 * 49),
        ({"lrn": True, "dropout": 0.4, "activation": "sigmoid"}, 11_194_984),
    ],
)
def test_parameters_are_counted(options, expected):
    assert count(bn_inception(**options)) == expected


def test_without_normalization_a_bias_replaces_gamma_and_beta():
    with_norm, without = bn_inception(), bn_inception(normalization="none")
    channels = sum(m.num_features for m in with_norm.modules() if isinstance(m, nn.BatchNorm2d))
    assert count(without) == count(with_norm) - 2 * channels + channels
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in without.modules())


def test_table_has_the_rows_and_outputs_that_figure_5_prints():
    assert [row.type for row in FIGURE5] == (
        [*"conv1 pool1 conv2 pool2 3a 3b 3c 4a 4b 4c 4d 4e 5a 5b".split(), "avg pool"]
    )
    assert [row.output for row in FIGURE5] == [
        (112, 64), (56, 64), (56, 192), (28, 192),
        (28, 256), (28, 320), (28, 576),
        (14, 576), (14, 576), (14, 576), (14, 576), (14, 1024),
        (7, 1024), (7, 1024), (1, 1024),
    ]  # fmt: skip
    assert sum(row.depth for row in FIGURE5) == 32
    assert len(MODULES) == 10


@pytest.mark.parametrize(
    ("projection", "channels"),
    [
        (96, [256, 320, 576, 576, 576, 576, 576, 1024, 1024, 1024]),
        (128, [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]),
    ],
)
def test_branches_add_up(projection, channels):
    assert [row.output[1] for row in repaired(projection)] == channels
    changed = {row.type for row, old in zip(repaired(projection), MODULES, strict=True) if
               row.output != old.output}  # fmt: skip
    assert changed == (set() if projection == 96 else {"4c", "4d", "4e"})


@pytest.mark.parametrize("projection", [96, 128])
def test_modules_put_out_what_the_table_says(projection):
    with torch.device("meta"):
        model = bn_inception(pool_proj_4cd=projection)
    found = {}
    for name, module in model.inception.items():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: found.update({name: (inputs[0], output)})
        )
    model(torch.empty(2, 3, 224, 224, device="meta"))
    for row in repaired(projection):
        before, after = found[row.type]
        assert before.shape[-1] == row.output[0]  # Figure 5 states sizes before the stride
        assert after.shape[1:] == (row.output[1], *[row.output[0] // row.stride] * 2)


# Sizes


@pytest.mark.parametrize("size", SIZES)
def test_any_size_from_32_gives_logits(network, size):
    with torch.no_grad():
        assert network(random_images(2, 3, *size, dtype=torch.float64)).shape == (2, 10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("projection", [96, 128])
def test_features_only_gives_five_strides(projection, size):
    with torch.device("meta"):
        model = bn_inception(features_only=True, pool_proj_4cd=projection)
        maps = model(torch.empty(2, 3, *size))
    channels = [64, 192, 320, 576 if projection == 96 else 608, 1024]
    sides = zip(maps_at(size[0]), maps_at(size[1]), strict=True)
    expected = [(2, c, *hw) for c, hw in zip(channels, sides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    if size == (224, 224):
        assert [m.shape[-1] for m in maps] == [112, 56, 28, 14, 7]


def test_feature_maps_are_those_of_the_classifier(network):
    x = random_images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps = network.feature_maps(x)
        assert torch.equal(network.fc(maps[-1].mean((2, 3))), network(x))
        headless = BNInception(features_only=True, width=0.25).double().eval()
        state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
        headless.load_state_dict(state)
        for ours, theirs in zip(headless(x), maps, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [32, 224, (45, 64)])
@pytest.mark.parametrize("normalization", ["batch", "per-activation-last"])
def test_without_the_first_pooling_maps_are_twice_as_large(size, normalization):
    height, width = (size, size) if isinstance(size, int) else size
    small = narrow(stem_stride=4, image_size=size, normalization=normalization).eval()
    if normalization == "batch":
        small.load_state_dict(narrow().state_dict())
    with torch.no_grad():
        maps = small.feature_maps(random_images(2, 3, height, width))
        assert small(random_images(2, 3, height, width)).shape == (2, 10)
    for found, stride in zip(maps, (2, 2, 4, 8, 16), strict=True):
        for found_size, image_size in zip(found.shape[2:], (height, width), strict=True):
            assert abs(found_size - image_size / stride) < 1


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("width", [4, 7])
def test_strided_pooling_covers_every_pixel(height, width):
    x = random_images(2, 3, height, width)
    pooled = StridedMaxPool()(x)
    assert pooled.shape[2:] == (math.ceil(height / 2), math.ceil(width / 2))
    for i in range(pooled.shape[2]):
        for j in range(pooled.shape[3]):
            window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            assert torch.equal(pooled[:, :, i, j], window.amax((2, 3)))
    if height % 2 == 0 and width % 2 == 0 and height > 2:
        assert torch.equal(pooled, nn.MaxPool2d(3, 2, ceil_mode=True)(x))
