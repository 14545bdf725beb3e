"""State dicts of others: which are read, and what is said of those that are not."""

import io
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from bnlib import bn_inception
from bnlib.inception import load_cadene, to_cadene


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
