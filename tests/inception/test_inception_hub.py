"""The port's preparation of images, and the entry points of torch.hub."""

import importlib.util
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from inception_port import Port, TransformImage, pretrained_settings
from normalization import settle
from PIL import Image

from bnlib import BNInception
from bnlib.inception import cadene_transform

ROOT = str(Path(__file__).parents[2])


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
