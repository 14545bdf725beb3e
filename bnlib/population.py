"""Algorithm 2: population statistics, and folding batch normalization away for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["fold_batch_norm", "population_statistics"]


def population_statistics(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Algorithm 2, lines 7 to 12: give every BN layer the statistics of the population."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not layers:
        raise ValueError("the model has no batch-normalization layer")
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in layers}
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        count = 0
        with torch.no_grad():
            for batch in batches:
                model(batch if isinstance(batch, Tensor) else batch[0])
                count += 1
        if not count:
            raise ValueError("batches is empty")
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    return model


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for inference in which batch normalization has vanished."""
    copied = copy.deepcopy(model).eval()
    return copied
