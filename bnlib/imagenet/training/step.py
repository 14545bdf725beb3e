"""One training step: a mini-batch forward and backward, and the update of the weights.

:mod:`bnlib.imagenet.replicas` shares these functions, so that it cannot differ in them.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.state import State

__all__ = ["compute_loss", "seed_dropout", "train_step", "update_weights"]


def train_step(
    state: State, network: nn.Module, images: Tensor, labels: Tensor, steps_per_epoch: float
) -> None:
    """Take a step with this process's share of a mini-batch.

    ``network`` is the model of ``state``, or what exchanges its gradients among the processes;
    images are float32 (n, 3, S, S) and labels int64 (n,), on the device.
    """
    recipe, device = state.recipe, state.group.device
    network.train()
    state.optimizer.zero_grad(set_to_none=True)
    seed_dropout(recipe, state.step, state.group.rank)
    images = images.to(memory_format=torch.channels_last)
    parts = zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True)
    without_exchange = getattr(network, "no_sync", contextlib.nullcontext)
    for number, (part, targets) in enumerate(parts, 1):
        is_last = number == recipe.accumulate  # after it, processes exchange their gradients
        with contextlib.nullcontext() if is_last else without_exchange():
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = network(part)
                loss = compute_loss(logits, targets)
            (loss / recipe.accumulate).backward()
        state.add_loss(loss.detach(), (logits.argmax(1) == targets).float().mean())
    update_weights(state, steps_per_epoch)


def update_weights(state: State, steps_per_epoch: float) -> None:
    """Update the weights by their gradients, and their average; count the step."""
    for parameters in state.optimizer.param_groups:
        parameters["lr"] = state.recipe.learning_rate_at(state.step, steps_per_epoch)
    state.optimizer.step()
    state.update_average()
    state.step += 1


def seed_dropout(recipe: Recipe, step: int, rank: int) -> None:
    """Seed torch's generator: which features are dropped depends on the step and the process."""
    torch.manual_seed(((recipe.seed * 1_000_003 + step) * 4096 + rank) % 2**63)


def compute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32, of logits (m, classes) and labels (m,)."""
    return cross_entropy(logits.float(), targets)
