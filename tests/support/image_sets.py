"""What tests of the data path share: a recipe, a sound JPEG, a folder with damaged images."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import torch
from images import encoded, synthetic
from PIL import Image
from torch import Tensor

from bnlib.imagenet import recipe

SMALL = recipe("bn-x5").replace(image_size=32, num_classes=3, batch_size=8, shards=6, seed=7)
GOOD = encoded(synthetic(3), quality=95)


def reference(data: bytes) -> Tensor:
    """The pixels as PIL decodes them: uint8 (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def damage(folder: Path, target: Path) -> dict[str, str]:
    """Copy a folder of images and ruin three; returns their names as keys."""
    shutil.copytree(folder, target)
    ruin = {"ant/003.JPEG": b"", "bee/005.JPEG": GOOD[:300], "cat/000.JPEG": b"<html>"}
    for name, data in ruin.items():
        (target / "train" / name).write_bytes(data)
    return dict.fromkeys(ruin, "")
