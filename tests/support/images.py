"""Synthetic images, and folders of them in the layout of ImageNet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def synthetic(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth shapes and some noise, in color."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(int) + rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The image as a file of that kind."""
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def write_folder(root: Path, train: int = 12, val: int = 4) -> Path:
    """Three classes, with that many images each in ``train/`` and ``val/``."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + 100 * (split == "val") + number
                size = (96 + 7 * (number % 4), 72 + 11 * (number % 3))
                image = synthetic(seed, *size)
                (folder / f"{number:03}.JPEG").write_bytes(encoded(image, quality=90))
    return root
