"""Pieces of one training step that the loop (:mod:`bnlib.imagenet.training.loop`) and its
simulation (:mod:`bnlib.imagenet.simulation`) share, so that they cannot differ in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bnlib.imagenet.recipes import Recipe

__all__ = ["follow", "loss_of", "seed_dropout"]


def seed_dropout(recipe: Recipe, step: int, rank: int) -> None:
    """Seed torch's generator: which features are dropped depends on the step and the process."""
    torch.manual_seed(((recipe.seed * 1_000_003 + step) * 4096 + rank) % 2**63)


def loss_of(output: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and mean cross-entropy in nats.

    Parameters
    ----------
    output
        Logits (m, classes).
    targets
        int64 (m,).
    """
    return output, cross_entropy(output.float(), targets)


def follow(average: AveragedModel, model: nn.Module, polyak: float, step: int) -> None:
    """Move the averaged weights towards those after step ``step``, counted from 0.

    At the start they follow faster, or they would stay near the initial weights.
    """
    average.multi_avg_fn = get_ema_multi_avg_fn(min(polyak, (1 + step) / (10 + step)))
    average.update_parameters(model)
