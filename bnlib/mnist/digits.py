"""Real handwritten digits as tensors: MNIST, or the small set that scikit-learn bundles.

MNIST (60,000 + 10,000 images) is read from ``$BNLIB_DATA/MNIST/raw`` or downloaded by torchvision
into it; every file is compared with its published checksum before it is believed. Where it cannot
be had, ``dataset="auto"`` falls back to the 1,797 digits of scikit-learn (the test part of the UCI
"Optical Recognition of Handwritten Digits" set), enlarged from 8x8 to 28x28, and says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

DATASETS = ("auto", "mnist", "digits")
_LOGGER = logging.getLogger(__name__)
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_DIGITS_TRAINING = 1500


class DataError(RuntimeError):
    """A data file is missing, damaged or cannot be downloaded; the message says which."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 28x28, as tensors.

    Attributes
    ----------
    name
        ``"MNIST"`` or ``"digits"``; put it into every title that shows a number measured on it.
    train_images
        uint8 tensor of shape ``(N, 784)``, intensities 0 (paper) to 255 (ink).
    train_labels
        int64 tensor of shape ``(N,)``, values 0 to 9.
    test_images
        As ``train_images``, for testing.
    test_labels
        As ``train_labels``, for testing.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def sha256(self) -> str:
        """Hash of the pixels and labels, for a recorded run's manifest."""
        digest = hashlib.sha256()
        parts = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        for tensor in parts:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def binarize(images: Tensor, threshold: float = 0.5) -> Tensor:
    """The binary image of section 4.1: 1 where the ink is darker than ``threshold``.

    The paper does not state its threshold.

    Parameters
    ----------
    images
        uint8 intensities, any shape.
    threshold
        Fraction of full intensity, from 0 (every trace of ink counts) to just below 1.

    Returns
    -------
    Tensor
        float32 zeros and ones of the same shape.

    Raises
    ------
    TypeError
        If the images are not uint8.
    ValueError
        If the threshold lies outside [0, 1).
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 intensities 0..255, got {images.dtype}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    return (images > 255 * threshold).float()


def half_size(images: Tensor) -> Tensor:
    """The image at half its resolution, each pixel the mean of four: 14x14 instead of 28x28.

    A network on a quarter of the inputs trains several times faster; chapters that train dozens of
    networks use it.

    Parameters
    ----------
    images
        uint8 intensities, ``(N, 784)``.

    Returns
    -------
    Tensor
        float32 of shape ``(N, 196)``, intensities 0 (paper) to 1 (ink).

    Raises
    ------
    TypeError
        If the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 intensities 0..255, got {images.dtype}")
    squares = images.view(-1, 1, 28, 28).float() / 255
    return torch.nn.functional.avg_pool2d(squares, 2).flatten(1)


def data_root() -> Path:
    """Where data sets are looked for and kept: ``$BNLIB_DATA``, else ``~/.cache/bnlib``."""
    named = os.environ.get("BNLIB_DATA")
    return Path(named) if named else Path.home() / ".cache" / "bnlib"


def load(dataset: str = "auto", *, root: Path | None = None, seconds: float = 20) -> Digits:
    """Load handwritten digits.

    Parameters
    ----------
    dataset
        ``"mnist"``; ``"digits"`` for the set bundled with scikit-learn; ``"auto"`` for MNIST if it
        is on disk or can be downloaded within ``seconds``, else digits, with a warning in the log.
    root
        Folder that holds (or shall hold) ``MNIST/raw``; :func:`data_root` by default.
    seconds
        Longest time to spend on a download.

    Raises
    ------
    ValueError
        For an unknown data set name.
    DataError
        If MNIST was asked for by name and cannot be had, or if a file of it on disk is damaged
        (also under ``"auto"``: a damaged file is never passed over).
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    if dataset == "digits":
        return _bundled()
    root = root or data_root()
    folder = root / "MNIST" / "raw"
    if not any((folder / name).exists() for name in _MNIST_MD5):
        try:
            _download(root, seconds)
        except DataError as error:
            if dataset == "mnist":
                raise
            _LOGGER.warning(
                "MNIST is neither on disk nor downloadable here (%s). What follows uses the 1,797 "
                "digits bundled with scikit-learn, which are not MNIST.",
                error,
            )
            return _bundled()
    return _mnist(root)


@lru_cache(maxsize=2)
def _mnist(root: Path) -> Digits:
    from torchvision.datasets import MNIST

    folder = root / "MNIST" / "raw"
    for name, expected in _MNIST_MD5.items():
        path = folder / name
        if not path.exists():
            raise DataError(
                f"{path} is missing while other files of MNIST are there; delete {folder} to have "
                "all of it downloaded again, or put the file back"
            )
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(
                f"{path} is damaged or incomplete ({path.stat().st_size} bytes, md5 {found}, "
                f"expected {expected}); delete {folder} to have it downloaded again"
            )
    train = MNIST(root=str(root), train=True, download=False)
    test = MNIST(root=str(root), train=False, download=False)
    return Digits("MNIST", train.data.flatten(1), train.targets, test.data.flatten(1), test.targets)


def _download(root: Path, seconds: float) -> None:
    """Download MNIST into a folder beside its place and rename it, within ``seconds``.

    torchvision's downloader knows the mirrors and the archives' checksums but no time limit, so
    it runs in a process that can be stopped.
    """
    destination = root / "MNIST" / "raw"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=".download-")
    except OSError as error:
        raise DataError(f"cannot write to {root}: {error.strerror}") from error
    program = (
        "import sys\nfrom torchvision.datasets import MNIST\n"
        "MNIST(root=sys.argv[1], download=True)\n"
    )
    with scratch as folder:
        command = [sys.executable, "-c", program, folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DataError(f"the download did not finish within {seconds:g} seconds") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"the download failed: {last}") from None
        downloaded = Path(folder) / "MNIST" / "raw"
        for archive in downloaded.glob("*.gz"):
            archive.unlink()
        if destination.exists():
            destination.rmdir()
        os.replace(downloaded, destination)


@lru_cache(maxsize=1)
def _bundled() -> Digits:
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bicubic")
    pixels = large.clamp(0, 255).round().to(torch.uint8).flatten(1)
    targets = torch.from_numpy(labels.astype(np.int64))
    # The set is ordered by writer in stretches; a fixed shuffle makes the two parts alike.
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, targets = pixels[order], targets[order]
    cut = _DIGITS_TRAINING
    return Digits("digits", pixels[:cut], targets[:cut], pixels[cut:], targets[cut:])
