"""BN-Inception at a quarter of its width, and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnlib import BNInception, bn_inception


def narrow(**options: Any) -> BNInception:
    """A network for what holds at any width."""
    return bn_inception(**{"num_classes": 10, "width": 0.25, **options})


def random_images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal noise."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def maps_at(n: int) -> list[int]:
    """Length of a side at strides 2 to 32: convolutions round up, the stem's poolings down."""
    first = (n + 1) // 2
    second = first // 2
    third = second // 2
    fourth = (third + 1) // 2
    return [first, second, third, fourth, (fourth + 1) // 2]
