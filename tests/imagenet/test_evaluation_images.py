"""The images that evaluation shows to a network: what torchvision would show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from images import write_folder
from PIL import Image
from torch import Tensor, nn

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.evaluation.inference import Predicted, predict
from bnlib.imagenet.processes import Processes


class Shown(nn.Module):
    """A network of three classes that keeps the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images.clone())
        return torch.zeros(len(images), 3)


def shown(
    source: Source, size: int, *, rank: int = 0, world: int = 1, workers: int = 0, batch: int = 5
) -> tuple[Tensor, list[Predicted]]:
    network = Shown()
    group = Processes(rank, world, torch.device("cpu"))
    predicted = list(predict([network], source, size, group=group, workers=workers, batch=batch))
    return torch.cat(network.images), predicted


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_the_centre_of_every_image_once(tmp_path: Path, workers: int) -> None:
    from torchvision.transforms import v2

    source = open_source(write_folder(tmp_path), "val")
    images, predicted = shown(source, 48, workers=workers)
    assert [len(each.labels) for each in predicted] == [5, 5, 2]
    assert torch.cat([each.labels for each in predicted]).tolist() == source.labels.tolist()
    transform = v2.Compose(
        [
            v2.Resize(55),  # 48 * 8 / 7
            v2.CenterCrop(48),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = [
        transform(
            torch.from_numpy(np.array(Image.open(io.BytesIO(source[i].data)))).permute(2, 0, 1)
        )
        for i in range(len(source))
    ]
    assert (images - torch.stack(theirs)).abs().mean() < 0.01


def test_evaluation_is_divided_among_processes_and_names_what_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path)
    (tmp_path / "val" / "bee" / "001.JPEG").write_bytes(b"")
    source = open_source(tmp_path, "val")
    seen = []
    for rank in (0, 1):
        caplog.clear()
        images, predicted = shown(source, 32, rank=rank, world=2)
        seen.append(torch.cat([each.indices for each in predicted]).tolist())
        assert len(images) == len(seen[-1])
        assert ("bee/001.JPEG" in caplog.text) == (rank == 1)
    assert seen == [[0, 2, 4, 6, 8, 10], [1, 3, 7, 9, 11]]


def test_evaluation_draws_nothing_from_the_global_generators(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path), "val")
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    shown(source, 32, workers=1)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
