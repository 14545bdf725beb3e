"""One training step: a mini-batch forward and backward, and the update of the weights.

:mod:`bnlib.imagenet.replicas` shares these functions, so that it cannot differ in them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.state import State

__all__ = ["compute_loss", "seed_dropout", "train_step", "update_ema", "update_weights"]


def train_step(
    state: State, network: nn.Module, images: Tensor, labels: Tensor, steps_per_epoch: float
) -> None:
    """Take a step with this process's share of a mini-batch.

    Parameters
    ----------
    state
        Of the run; its weights, their average, the optimizer, the step and the sums change.
    network
        The model of ``state``, or what exchanges its gradients among the processes.
    images, labels
        float32 (n, 3, S, S) and int64 (n,), on the device.
    steps_per_epoch
        For the learning rate.
    """
    recipe, device = state.recipe, state.group.device
    network.train()
    state.optimizer.zero_grad(set_to_none=True)
    seed_dropout(recipe, state.step, state.group.rank)
    images = images.to(memory_format=torch.channels_last)
    parts = zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True)
    for number, (part, targets) in enumerate(parts, 1):
        with _gradients_exchanged(network, number == recipe.accumulate):
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
    if state.average is not None:
        update_ema(state.average, state.model, state.recipe.polyak, state.step)
    state.step += 1


def seed_dropout(recipe: Recipe, step: int, rank: int) -> None:
    """Seed torch's generator: which features are dropped depends on the step and the process."""
    torch.manual_seed(((recipe.seed * 1_000_003 + step) * 4096 + rank) % 2**63)


def compute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32, of logits (m, classes) and labels (m,)."""
    return cross_entropy(logits.float(), targets)


def update_ema(average: AveragedModel, model: nn.Module, polyak: float, step: int) -> None:
    """Move the averaged weights towards those after step ``step``, counted from 0.

    At the start they move faster, or they would stay near the initial weights.
    """
    average.multi_avg_fn = get_ema_multi_avg_fn(min(polyak, (1 + step) / (10 + step)))
    average.update_parameters(model)


@contextlib.contextmanager
def _gradients_exchanged(network: nn.Module, now: bool) -> Iterator[None]:
    """Among the processes, after the last micro-batch only."""
    no_sync = getattr(network, "no_sync", contextlib.nullcontext)
    with contextlib.nullcontext() if now else no_sync():
        yield
