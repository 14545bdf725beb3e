"""Probabilities that no network said, for what is computed from probabilities alone."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

#: Seed, networks, images, classes and sharpness of made-up probabilities.
made_up = st.tuples(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(2, 9),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)
several = settings(max_examples=50, deadline=None)


def make(
    seed: int, networks: int, images: int, classes: int, sharpness: float
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(networks, images, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    return list((sharpness * logits).softmax(2)), labels
