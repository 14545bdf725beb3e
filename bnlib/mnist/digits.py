"""Real handwritten digits as tensors: MNIST, or the small set that scikit-learn bundles.

MNIST is read from ``$BNLIB_DATA/MNIST/raw``, into which torchvision downloads it; every file is
compared with its published checksum. The digits of scikit-learn are the test part of the UCI
"Optical Recognition of Handwritten Digits" set, enlarged from 8x8 to 28x28.
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
_RAW = Path("MNIST", "raw")
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_DOWNLOAD_SECONDS = 20.0


class DataError(RuntimeError):
    """A data file is missing, damaged or cannot be downloaded; the message says which."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 28x28: images are uint8, 0 (paper) to 255 (ink), labels int64, 0 to 9."""

    name: str  #: "MNIST" or "digits"; for every title that shows a number measured on it
    train_images: Tensor  #: (N, 784)
    train_labels: Tensor  #: (N,)
    test_images: Tensor  #: (M, 784)
    test_labels: Tensor  #: (M,)

    @property
    def sha256(self) -> str:
        """Hash of the pixels and labels, for a recorded run's manifest."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _check_intensities(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 intensities 0..255, got {images.dtype}")


def binarize(images: Tensor, threshold: float = 0.5) -> Tensor:
    """The binary image of section 4.1, float32: 1 where the ink is darker than ``threshold``.

    The threshold, which the paper does not state, is a fraction of full intensity, from 0 (every
    trace of ink counts) to just below 1; another is a ValueError. ``images`` are uint8 intensities
    of any shape; another type is a TypeError.
    """
    _check_intensities(images)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    return (images > 255 * threshold).float()


def half_size(images: Tensor) -> Tensor:
    """Images at half their resolution, from 0 to 1 (ink): ``(N, 784)`` uint8, ``(N, 196)`` float32.

    Each pixel is the mean of four. A network on a quarter of the inputs trains several times
    faster, which chapters that train dozens of networks need.
    """
    _check_intensities(images)
    squares = images.view(-1, 1, 28, 28).float() / 255
    return torch.nn.functional.avg_pool2d(squares, 2).flatten(1)


def data_root() -> Path:
    """Where data sets are looked for and kept: ``$BNLIB_DATA``, else ``~/.cache/bnlib``."""
    named = os.environ.get("BNLIB_DATA")
    return Path(named) if named else Path.home() / ".cache" / "bnlib"


def load(dataset: str = "auto") -> Digits:
    """Load handwritten digits.

    Parameters
    ----------
    dataset
        ``"mnist"``; ``"digits"`` for the set bundled with scikit-learn; ``"auto"`` for MNIST if it
        is under :func:`data_root` or can be downloaded there within 20 seconds, else digits, with a
        warning in the log.

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
    root = data_root()
    if dataset != "digits" and not any((root / _RAW / name).exists() for name in _MNIST_MD5):
        try:
            _download(root)
        except DataError as error:
            if dataset == "mnist":
                raise
            _LOGGER.warning(
                "MNIST is neither on disk nor downloadable here (%s). What follows uses the 1,797 "
                "digits bundled with scikit-learn, which are not MNIST.",
                error,
            )
            dataset = "digits"
    return _bundled() if dataset == "digits" else _mnist(root)


@lru_cache(maxsize=2)
def _mnist(root: Path) -> Digits:
    from torchvision.datasets import MNIST

    folder = root / _RAW
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
    train, test = MNIST(root=str(root)), MNIST(root=str(root), train=False)
    return Digits("MNIST", train.data.flatten(1), train.targets, test.data.flatten(1), test.targets)


def _download(root: Path) -> None:
    """Download MNIST beside its place, in a process that can be stopped, and move it there."""
    destination = root / _RAW
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=".download-")
    except OSError as error:
        raise DataError(f"cannot write to {root}: {error.strerror}") from error
    with scratch as folder:
        program = f"from torchvision.datasets import MNIST; MNIST({folder!r}, download=True)"
        command = [sys.executable, "-c", program]
        limit = _DOWNLOAD_SECONDS
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise DataError(f"the download did not finish within {limit:g} seconds") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"the download failed: {last}") from None
        downloaded = Path(folder, _RAW)
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
    return Digits("digits", pixels[:1500], targets[:1500], pixels[1500:], targets[1500:])
