"""A folder of images, and a packed copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import write_folder

from bnlib.imagenet.data import pack


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets")
    destination = tmp_path_factory.mktemp("packed")
    status = pack.main(
        [str(folder), str(destination), "--shorter-side", "64", "--quality", "95", "--workers", "2"]
    )
    assert status == 0
    return destination
