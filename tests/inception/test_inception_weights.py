"""Weights in the pretrainedmodels port's layout: the same function, and nothing but weights."""

import copy
import importlib.util
import io
import os
import pickle
import shutil
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from normalization import settle
from PIL import Image
from torch import nn

from bnlib import BNInception, bn_inception, fold_batch_norm
from bnlib.inception import cadene_transform, load_cadene, to_cadene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the port compares strings with `is`
    from pretrainedmodels.models.bninception import BNInception as Port
    from pretrainedmodels.models.bninception import pretrained_settings
    from pretrainedmodels.utils import TransformImage

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def tmp_path(tmp_path):
    """Removed after each test: the files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def assert_near(ours, theirs, tolerance=1e-11):
    """Equal up to rounding, as measured against the largest value."""
    scale = theirs.abs().max()
    assert scale > 0
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * scale


@pytest.fixture(scope="module")
def port():
    """The port in float64, in evaluation mode; tests do not change it."""
    return settle(Port())


@pytest.fixture(scope="module")
def small():
    """A state dict in float32 with ten classes, for tests of files."""
    return settle(Port(num_classes=10)).float().state_dict()


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
        (64, {}),
        (64, {"conv_bias": False}),
        (96, {}),
    ],
)
def test_training_step_equals_the_port(size, options):
    theirs = port_for(size).train()
    ours = load_cadene(theirs.state_dict(), **options).train()
    x, weights = images(6, 3, size, size), images(1000)
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


def same(model, state_dict):
    return all(torch.equal(v, state_dict[k]) for k, v in to_cadene(model).items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip file", "file of old torch"])
def test_files_are_read(tmp_path, small, zipped):
    path = tmp_path / "weights.pth"
    torch.save(small, path, _use_new_zipfile_serialization=zipped)
    assert same(load_cadene(path), small)
    assert same(load_cadene(str(path)), small)


def test_old_files_without_counters_and_with_row_vectors_are_read(tmp_path, small):
    # Files of the first PyTorch versions have no num_batches_tracked and (1, C) in normalization.
    old = {
        name: value[None] if "_bn." in name else value
        for name, value in small.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    back = to_cadene(load_cadene(tmp_path / "old.pth"))
    for name, value in small.items():
        expected = torch.zeros_like(value) if name.endswith("num_batches_tracked") else value
        assert torch.equal(back[name], expected), name


def test_nested_and_prefixed_state_dicts_are_read(tmp_path, small):
    prefixed = {f"module.{name}": value for name, value in small.items()}
    torch.save({"epoch": 3, "state_dict": prefixed}, tmp_path / "checkpoint.pth")
    assert same(load_cadene(tmp_path / "checkpoint.pth"), small)


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


@pytest.mark.parametrize("wrong", [3, None, nn.Linear(1, 1)])
def test_what_is_neither_path_nor_mapping_is_refused(wrong):
    with pytest.raises(TypeError, match=r"expected a path or a state dict"):
        load_cadene(wrong)


def test_missing_files_directories_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*bn_inception-52deb4733"):
        load_cadene(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a directory"):
        load_cadene(tmp_path)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"empty\.pth.*is empty.*Download it again"):
        load_cadene(tmp_path / "empty.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1])
def test_truncated_files_are_refused(tmp_path, truncatable, zipped, part):
    whole = truncatable[zipped]
    length = min(max(int(len(whole) * part), 2), len(whole) - 1)
    path = tmp_path / "truncated.pth"
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"truncated\.pth.*cut off or damaged.*download it again"):
        load_cadene(path)


@pytest.fixture(scope="module")
def truncatable(small):
    some = {name: value for name, value in small.items() if name.startswith("inception_3a")}
    found = {}
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(some, file, _use_new_zipfile_serialization=zipped)
        found[zipped] = file.getvalue()
    return found


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\n\n<html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n0000000", "HDF5"),
        (b"\x1f\x8b\x08\x00aaaaaaa", "gzip"),
        (b"just some text", "its first bytes are b'just som"),
        (bytes(64), "its first bytes are"),
    ],
)
def test_files_that_are_no_checkpoint_say_what_they_look_like(tmp_path, content, looks):
    (tmp_path / "what.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"what.pth.*{looks}.*Expected a state dict"):
        load_cadene(tmp_path / "what.pth")


def test_other_zip_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.zip.*zip archive.*something else"):
        load_cadene(tmp_path / "other.zip")


class Trap:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("writer", ["zip", "old", "pickle 0", "pickle 2", "pickle 5", "nested"])
def test_no_pickle_is_ever_executed(tmp_path, small, writer):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pth"
    content = {**small, "last_linear.bias": Trap(sprung)} if writer == "nested" else Trap(sprung)
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(writer[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer != "old")
    with pytest.raises(ValueError, match=r"trap\.pth") as error:
        load_cadene(path)
    assert not sprung.exists()
    # Nor does the message, or what is shown with it, advise to do so.
    assert "weights_only" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    if writer != "pickle 5":  # its very first instructions are already refused
        assert "mkdir" in str(error.value)
        assert "could run code" in str(error.value)
    torch.load(path, weights_only=False) if writer[0] in "zno" else pickle.loads(path.read_bytes())
    assert sprung.exists(), "the trap does not work, so nothing was shown"


def test_pickled_models_are_refused_with_the_remedy(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"Sequential.*save model\.state_dict\(\) instead"):
        load_cadene(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor"),
        ([torch.zeros(3)], "holds a list"),
        ({}, "missing: conv1_7x7_s2.weight.* and 413 more"),
        ({"model": {}, "epoch": 3}, "'model', 'epoch' that are not tensors.*state_dict"),
    ],
)
def test_files_with_other_content_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "content.pth")
    with pytest.raises(ValueError, match=message):
        load_cadene(tmp_path / "content.pth")


@pytest.mark.parametrize(
    ("make", "key", "looks"),
    [
        ("resnet18", "layer1.0.conv1.weight", "torchvision's resnet"),
        ("googlenet", "inception3a.branch1.conv.weight", "torchvision's googlenet"),
        ("inception_v3", "Mixed_5b.branch1x1.conv.weight", "torchvision's inception_v3"),
        ("densenet121", "features.denseblock1.denselayer1.conv1.weight", "torchvision's densenet"),
        ("alexnet", "features.0.weight", "torchvision's vgg or alexnet"),
        ("vgg11", "features.0.weight", "torchvision's vgg or alexnet"),
    ],
)
def test_other_networks_are_recognized(make, key, looks):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = getattr(models, make)(weights=None).state_dict()
    assert key in other
    with pytest.raises(ValueError, match="(?s)missing: .*unexpected: .*look like " + looks):
        load_cadene(other)


def test_our_own_state_dict_is_recognized():
    with pytest.raises(ValueError, match=r"(?s)this library's own.*load_state_dict"):
        load_cadene(bn_inception().state_dict())


def test_a_prefix_of_another_program_is_recognized(small):
    with pytest.raises(ValueError, match=r"'base_model\.' before each key; remove that"):
        load_cadene({f"module.base_model.{name}": value for name, value in small.items()})


def without(name):
    return lambda state: state.pop(name)


def replaced(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("inception_3b_3x3.bias"), r"missing: inception_3b_3x3\.bias$"),
        (without("inception_3b_3x3_bn.running_var"), r"missing: inception_3b_3x3_bn\.running_var$"),
        (without("last_linear.weight"), r"missing: last_linear\.weight"),
        (replaced("fc_action.weight", torch.zeros(2, 2)), r"unexpected: fc_action\.weight$"),
        (
            replaced("inception_4c_pool_proj.weight", torch.zeros(96, 576, 1, 1)),
            r"inception_4c_pool_proj\.weight \(torch\.float32, shape \[96, 576, 1, 1\], "
            r"not \[128, 576, 1, 1\]\)",
        ),
        (replaced("conv2_3x3.bias", torch.zeros(192, dtype=torch.int8)), "torch.int8"),
        (replaced("last_linear.bias", torch.zeros(11)), r"shape \[11\], not \[10\]"),
        (replaced("conv2_3x3_bn.weight", torch.zeros(2, 192)), r"shape \[2, 192\], not \[192\]"),
    ],
)
def test_each_difference_is_listed(small, change, message):
    changed = dict(small)
    change(changed)
    with pytest.raises(ValueError, match=f"(?sm)the state dict does not fit.*{message}"):
        load_cadene(changed)


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


@pytest.fixture(scope="module")
def image():
    """Landscape, with smooth gradients and with noise."""
    rng = np.random.default_rng(0)
    y, x, channel = np.ogrid[:427, :640, :3]
    waves = 127 * (1 + np.sin(x / (20 + 9 * channel) + y / 31))
    return Image.fromarray(np.clip(waves + rng.normal(0, 25, (427, 640, 3)), 0, 255).astype("u1"))


@pytest.mark.parametrize("rotated", [False, True])
def test_transform_prepares_an_image_as_the_port_does(image, rotated):
    image = image.transpose(Image.Transpose.ROTATE_90) if rotated else image
    theirs = TransformImage(pretrained_settings["bninception"]["imagenet"])(image)
    ours = cadene_transform()(image)
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == torch.float32
    # The port divides by 255 and multiplies again, which rounds; the pixels are the same.
    assert (ours - theirs).abs().max() < 1e-4
    mean = torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
    assert torch.equal(ours + mean, (ours + mean).round())


def test_transform_takes_other_modes_and_sizes(image):
    gray = cadene_transform(96, 64)(image.convert("L"))
    assert gray.shape == (3, 64, 64)
    assert torch.equal(gray[0] + 104, gray[2] + 128)
    assert cadene_transform(64, 64)(image.convert("P")).shape == (3, 64, 64)


def test_transform_is_blue_green_red():
    red = cadene_transform(32, 32)(Image.new("RGB", (40, 32), (255, 10, 0)))
    assert red[:, 0, 0].tolist() == [0 - 104, 10 - 117, 255 - 128]


def test_transform_can_be_sent_to_other_processes(image):
    transform = cadene_transform(64, 64)
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(image), transform(image))


@pytest.mark.parametrize(("resize", "size"), [(200, 224), (256, 16)])
def test_transform_refuses_sizes_that_do_not_fit(resize, size):
    with pytest.raises(ValueError, match=f"size is {size} and resize {resize}"):
        cadene_transform(resize, size)


def test_transform_without_torchvision_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        cadene_transform()


def test_an_image_is_classified_from_a_file_as_by_the_port(tmp_path, image):
    theirs = settle(Port()).float()
    torch.save(theirs.state_dict(), tmp_path / "bn_inception.pth")
    ours = torch.hub.load(
        ROOT, "bn_inception_cadene", str(tmp_path / "bn_inception.pth"), source="local"
    )
    batch = cadene_transform()(image)[None]
    with torch.no_grad():
        expected, found = theirs(batch).softmax(1), ours(batch).softmax(1)
    assert found.argmax() == expected.argmax()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_hub_lists_its_two_entry_points():
    spec = importlib.util.spec_from_file_location("hubconf", os.path.join(ROOT, "hubconf.py"))
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    public = {n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    assert public == {"bn_inception", "bn_inception_cadene"}  # what torch.hub.list shows
    assert set(hubconf.dependencies) == {"torch", "numpy"}
    model = torch.hub.load(ROOT, "bn_inception", source="local", num_classes=5, trust_repo=True)
    assert type(model) is BNInception
    assert model.fc.out_features == 5
