"""What networks are shown and what they say: against torchvision and PIL, crop by crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_runs import TINY, TinyNetwork
from images import encoded, synthetic, write_folder
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as theirs

from bnlib.imagenet.data import augment
from bnlib.imagenet.data.decode import Encoded
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.evaluation.crops import cropped
from bnlib.imagenet.evaluation.inference import Predicted, predict
from bnlib.imagenet.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


class Shown(nn.Module):
    """A network of three classes that keeps the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        self.images.append(images.clone())
        return torch.zeros(len(images), 3)


def joined(parts: list[Predicted]) -> Predicted:
    """All parts as one."""
    return Predicted(
        torch.cat([part.log_probabilities for part in parts], 1),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.indices for part in parts]),
    )


def said(network: nn.Module, source: Source, size: int, crops: int = 1, **options: int) -> Tensor:
    """The log-probabilities of a network, (n, classes)."""
    parts = list(predict([network], source, size, crops, group=ALONE, **options))
    return joined(parts).log_probabilities[0]


def centre(source: Source, index: int, size: int) -> Tensor:
    """The centre of an image, by PIL and torchvision."""
    pixels = np.array(Image.open(io.BytesIO(source[index].data)).convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = theirs.resize(image, [round(size * 8 / 7)], antialias=True)
    return theirs.center_crop(resized, [size, size])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [32, 48])
def test_one_crop_is_to_the_bit_what_torchvision_and_log_softmax_give(
    size: int, workers: int, data: Path
) -> None:
    torch.manual_seed(0)
    source = open_source(data, "val")
    network, images = TinyNetwork(TINY).eval(), Shown()
    parts = list(predict([network, images], source, size, group=ALONE, workers=workers, batch=5))
    assert [len(part.labels) for part in parts] == [5, 5, 2]
    found = joined(parts)
    assert found.indices.tolist() == list(range(12))
    assert found.labels.tolist() == source.labels.tolist()
    pixels = torch.stack([centre(source, index, size) for index in range(12)]).float()
    normalized = theirs.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(torch.cat(images.images), normalized, atol=1e-5, rtol=1e-5)
    for part in parts:
        shown = augment.normalize(pixels[part.indices]).to(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = network(shown).log_softmax(1)
        assert torch.equal(part.log_probabilities[0], expected)


@pytest.mark.parametrize("crops", [1, 10, 144])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_an_images_probabilities_are_the_mean_over_its_crops(
    crops: int, batch: int, tmp_path: Path
) -> None:
    """Also where a square image, among others, has crops that occur several times."""
    square = encoded(synthetic(7, 64, 64), quality=90)
    (write_folder(tmp_path, train=1, val=2) / "val" / "ant" / "001.JPEG").write_bytes(square)
    torch.manual_seed(0)
    network, source = TinyNetwork(TINY).eval(), open_source(tmp_path, "val")
    found = said(network, source, 32, crops, batch=batch)
    assert found.shape == (6, 3)
    for index, logs in enumerate(found):
        parts = torch.stack(cropped(Encoded(source[index].data).decode(), 32, crops)).float()
        with torch.no_grad():
            expected = network(augment.normalize(parts)).softmax(1).mean(0)
        torch.testing.assert_close(logs.exp(), expected)


def test_evaluation_is_in_float32_whatever_surrounds_it(data: Path) -> None:
    torch.manual_seed(0)
    network, source = TinyNetwork(TINY).eval(), open_source(data, "val")
    plain = said(network, source, 32)
    with torch.autocast("cpu", torch.bfloat16):
        said(Shown(), source, 32)
        surrounded = said(network, source, 32)
    assert torch.equal(plain, surrounded)
    assert not plain.requires_grad


def test_images_are_divided_among_processes_and_damaged_ones_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path)
    source = open_source(tmp_path, "val")
    (tmp_path / "val" / "bee" / "001.JPEG").write_bytes(b"no image")
    (tmp_path / "val" / "cat" / "000.JPEG").unlink()
    seen = []
    for rank in (0, 1):
        caplog.clear()
        network, group = Shown(), Processes(rank, 2, torch.device("cpu"))
        parts = list(predict([network], source, 32, group=group, batch=2))
        seen.append(joined(parts).indices.tolist())
        assert len(torch.cat(network.images)) == len(seen[-1])
        assert [source.labels[index] for index in seen[-1]] == joined(parts).labels.tolist()
        assert ("bee/001.JPEG" in caplog.text) == (rank == 1)
        assert ("cat/000.JPEG" in caplog.text) == (rank == 0)
    assert seen == [[0, 2, 4, 6, 10], [1, 3, 7, 9, 11]]


def test_an_image_that_would_become_a_line_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = encoded(Image.new("RGB", (60_000, 1)), "PNG")
    (write_folder(tmp_path, train=1, val=1) / "val" / "ant" / "000.JPEG").write_bytes(line)
    assert len(said(Shown(), open_source(tmp_path, "val"), 64)) == 2
    assert "60000x1 pixels would become" in caplog.text


def test_evaluation_draws_nothing_from_the_global_generators(data: Path) -> None:
    source = open_source(data, "val")

    def seeded() -> None:
        torch.manual_seed(0)
        np.random.seed(0)

    seeded()
    expected = torch.rand(3), np.random.rand(3)
    seeded()
    said(Shown(), source, 32, workers=1)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_a_network_of_fewer_classes_is_refused(data: Path) -> None:
    network = TinyNetwork(TINY.replace(num_classes=2)).eval()
    with pytest.raises(ValueError, match="has 3 classes, the network 2"):
        said(network, open_source(data, "val"), 32)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"workers": -1}, {"crops": 12}, {"size": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int], data: Path) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, workers .* one of \(1, 10, 144\)"):
        said(Shown(), open_source(data, "val"), **({"size": 32} | wrong))
