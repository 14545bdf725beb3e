"""The network: Figure 5's arithmetic, every option, every size, and the ways out of PyTorch."""

import copy
import math
import warnings

import pytest
import torch
from normalization import settle
from torch import nn

import bnlib
from bnlib import BNInception, PerActivationBatchNorm, bn_inception, fold_batch_norm
from bnlib.inception.layers import StridedMaxPool
from bnlib.inception.table import FIGURE5, MODULES, repaired

SIZES = [(32, 32), (33, 33), (65, 65), (100, 100), (216, 216), (224, 224), (64, 101)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def maps_at(n):
    """Length of a side at strides 2 to 32: convolutions round up, the stem's poolings down."""
    first = (n + 1) // 2
    second = first // 2
    third = second // 2
    fourth = (third + 1) // 2
    return [first, second, third, fourth, (fourth + 1) // 2]


def narrow(**options):
    """A network for what holds at any width."""
    return bn_inception(**{"num_classes": 10, "width": 0.25, **options})


@pytest.fixture(scope="module")
def network():
    """Narrow, in float64 and evaluation mode; tests do not change it."""
    return settle(narrow())


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
        assert network(images(2, 3, *size, dtype=torch.float64)).shape == (2, 10)


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
    x = images(2, 3, 64, 64, dtype=torch.float64)
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
        maps = small.feature_maps(images(2, 3, height, width))
        assert small(images(2, 3, height, width)).shape == (2, 10)
    for found, stride in zip(maps, (2, 2, 4, 8, 16), strict=True):
        for found_size, image_size in zip(found.shape[2:], (height, width), strict=True):
            assert abs(found_size - image_size / stride) < 1


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("width", [4, 7])
def test_strided_pooling_covers_every_pixel(height, width):
    x = images(2, 3, height, width)
    pooled = StridedMaxPool()(x)
    assert pooled.shape[2:] == (math.ceil(height / 2), math.ceil(width / 2))
    for i in range(pooled.shape[2]):
        for j in range(pooled.shape[3]):
            window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            assert torch.equal(pooled[:, :, i, j], window.amax((2, 3)))
    if height % 2 == 0 and width % 2 == 0 and height > 2:
        assert torch.equal(pooled, nn.MaxPool2d(3, 2, ceil_mode=True)(x))


# Options


def test_local_response_normalization_stands_in_the_stem():
    model, plain = settle(narrow(lrn=True)), settle(narrow())
    plain.load_state_dict(model.state_dict())
    x = images(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps, without = model.feature_maps(x), plain.feature_maps(x)
        assert torch.equal(maps[0], without[0])
        lrn = nn.LocalResponseNorm(5, 1e-4, 0.75)
        stem = plain.conv2(plain.conv2_reduce(lrn(plain.pool1(without[0]))))
        assert torch.equal(maps[1], lrn(stem))
    assert not torch.equal(maps[1], without[1])


def test_dropout_acts_on_the_features_in_training_only(network):
    model = copy.deepcopy(network)
    model.dropout = narrow(dropout=0.5).dropout.eval()
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = images(2, 3, 64, 64, dtype=torch.float64)
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
    model(images(3, 3, height, width)).square().sum().backward()
    with pytest.raises(ValueError, match="shape"):
        model(images(3, 3, height + 64, width + 64))


def test_network_without_normalization_has_no_statistics_and_biases():
    model = narrow(normalization="none")
    assert not list(model.buffers())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))
    unbiased = narrow(normalization="none", conv_bias=False)
    assert all(m.bias is None for m in unbiased.modules() if isinstance(m, nn.Conv2d))


def test_sigmoid_replaces_every_activation():
    model = narrow(activation="sigmoid")
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Sigmoid) == 69
    assert nn.ReLU not in kinds
    maps = model.feature_maps(images(2, 3, 64, 64))
    assert all(m.min() > 0 and m.max() < 1 for m in maps)


def test_normalization_comes_between_convolution_and_activation(network):
    seen = []
    layer = network.conv2
    handles = [
        m.register_forward_hook(lambda m, *_: seen.append(type(m))) for m in layer.children()
    ]
    with torch.no_grad():
        network(images(1, 3, 32, 32, dtype=torch.float64))
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
    assert model(images(2, 1, 64, 64)).shape == (2, 10)


def test_global_pools(network):
    x = images(2, 3, 96, 96, dtype=torch.float64)
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


# The rest of the library


@pytest.mark.parametrize("options", [{}, {"stem": "separable"}, {"pool_proj_4cd": 128}])
def test_folding_keeps_the_outputs(options):
    model = settle(narrow(**options))
    folded = fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for size in ((64, 64), (65, 97)):
        x = images(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            assert expected.std() > 0
            torch.testing.assert_close(
                folded(x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item()
            )


def test_our_batch_norm_can_take_the_place_of_torchs(network):
    ours, theirs = copy.deepcopy(network), copy.deepcopy(network)
    exchanged = 0
    for parent in list(ours.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = bnlib.BatchNorm(child.num_features, eps=child.eps).double()
                setattr(parent, name, norm.train(child.training))
                exchanged += 1
    assert exchanged == 69
    ours.load_state_dict(theirs.state_dict())
    x = images(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for training in (False, True, False):
            found, expected = ours.train(training)(x), theirs.train(training)(x)
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * scale)
    for (name, p), q in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=name)


def test_channels_last_changes_nothing_but_the_layout(network):
    model = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x = images(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        found = model(x.contiguous(memory_format=torch.channels_last))
        expected = network(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


# The ways out


@pytest.mark.parametrize(
    ("options", "training"),
    [({}, True), ({"features_only": True}, False)],  # export, below, traces ({}, False)
)
def test_dynamo_follows_the_network_in_one_graph(options, training):
    torch._dynamo.reset()
    model = narrow(**options).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(2, 3, 71, 72)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        found = compiled(x)
    assert type(found) is type(expected)
    many = isinstance(found, (list, tuple))
    for a, b in zip(found if many else [found], expected if many else [expected], strict=True):
        torch.testing.assert_close(a, b)


def test_export_with_a_dynamic_batch(network):
    program = torch.export.export(
        network,
        (images(2, 3, 65, 64, dtype=torch.float64),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    for n in (2, 5):
        x = images(n, 3, 65, 64, dtype=torch.float64, seed=n)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), network(x), rtol=1e-10, atol=1e-10)


def test_onnx_runtime_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = settle(narrow()).float()
    path = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model,
            (images(2, 3, 65, 64),),
            path,
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    path.unlink()  # it is large
    for n in (1, 3):
        x = images(n, 3, 65, 64, seed=n)
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        scale = expected.abs().max().item()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="TorchScript is gone")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"features_only": True}])
def test_torchscript_compiles_the_network(options):
    model = settle(narrow(**options))
    scripted = torch.jit.script(model)
    for training, size in ((False, 71), (False, 72), (True, 72)):
        x = images(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            # Training moves the running statistics, which the scripted network shares.
            found, expected = scripted.train(training)(x), model.train(training)(x)
        many = not isinstance(expected, torch.Tensor)
        assert many == ("features_only" in options)
        for a, b in zip(found if many else [found], expected if many else [expected], strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * scale)
