"""Real digits: read right, refused when damaged, and never one data set under another's name."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bnlib.mnist import digits

MNIST_RAW = digits.data_root() / "MNIST" / "raw"
needs_mnist = pytest.mark.skipif(
    not MNIST_RAW.is_dir(), reason="MNIST is not on disk; set BNLIB_DATA to a folder that has it"
)


@pytest.fixture(autouse=True)
def forget_cached_data() -> None:
    digits._mnist.cache_clear()


@needs_mnist
def test_mnist_has_its_sixty_and_ten_thousand_images() -> None:
    data = digits.load("mnist")
    assert data.name == "MNIST"
    assert data.train_images.shape == (60_000, 784)
    assert data.test_images.shape == (10_000, 784)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels.bincount().tolist()[:2] == [980, 1135]


def test_the_bundled_digits_are_real_and_named_as_what_they_are() -> None:
    data = digits.load("digits")
    assert data.name == "digits"
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.shape[1] == 784
    assert data.test_labels.bincount(minlength=10).min() > 15
    classified = torch.cdist(data.test_images.float(), data.train_images.float()).argmin(1)
    accuracy = (data.train_labels[classified] == data.test_labels).float().mean()
    assert accuracy > 0.95, "a nearest neighbor reads real digits"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which data sets are looked for."""
    monkeypatch.setenv("BNLIB_DATA", str(tmp_path))
    return tmp_path


def copied(root: Path) -> Path:
    raw = root / "MNIST" / "raw"
    shutil.copytree(MNIST_RAW, raw)
    raw.chmod(0o755)
    for path in raw.iterdir():
        path.chmod(0o644)
    return raw


@needs_mnist
@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("keep", [5000, 0])
def test_a_half_downloaded_file_is_named(root: Path, dataset: str, keep: int) -> None:
    path = copied(root) / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(digits.DataError, match=r"t10k-images-idx3-ubyte is damaged.*delete"):
        digits.load(dataset)


@needs_mnist
def test_one_flipped_byte_is_noticed(root: Path) -> None:
    path = copied(root) / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(digits.DataError, match="train-labels-idx1-ubyte"):
        digits.load("auto")


@needs_mnist
def test_a_missing_file_is_named(root: Path) -> None:
    (copied(root) / "train-images-idx3-ubyte").unlink()
    with pytest.raises(digits.DataError, match="train-images-idx3-ubyte is missing"):
        digits.load("mnist")


def no_network(*args: object, **kwargs: object) -> None:
    raise subprocess.CalledProcessError(1, "python", stderr="URLError: no route to host")


def too_slow(*args: object, **kwargs: object) -> None:
    raise subprocess.TimeoutExpired("python", 20)


@pytest.mark.parametrize(("failure", "reason"), [(no_network, "no route"), (too_slow, "20 sec")])
def test_without_mnist_auto_says_loudly_that_it_uses_the_bundled_digits(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: object,
    reason: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", failure)
    with caplog.at_level(logging.WARNING):
        data = digits.load("auto")
    assert data.name == "digits"
    assert "not MNIST" in caplog.text
    assert reason in caplog.text
    assert not list(root.rglob("*.download*")), "nothing is left of the attempt"


def test_without_mnist_asking_for_it_by_name_is_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(digits.DataError, match="no route to host"):
        digits.load("mnist")


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"auto, mnist, digits; got 'cifar'"):
        digits.load("cifar")


def test_binarized_pixels_are_zeros_and_ones_at_the_threshold() -> None:
    images = torch.tensor([[0, 1, 127, 128, 255]], dtype=torch.uint8)
    assert digits.binarize(images).tolist() == [[0, 0, 0, 1, 1]]
    assert digits.binarize(images, 0).tolist() == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_outside_the_unit_interval_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie"):
        digits.binarize(torch.zeros(2, dtype=torch.uint8), threshold)


def test_images_that_are_already_floats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"uint8.*float32"):
        digits.binarize(torch.zeros(2))
