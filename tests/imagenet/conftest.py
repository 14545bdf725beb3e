"""What most tests of training and evaluation start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from imagenet_runs import image_folder, use_tiny_network


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of images that no test may change."""
    folder = image_folder(tmp_path_factory)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_network(monkeypatch)
