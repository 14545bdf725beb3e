"""Whether a visitor left a module, its gradients and the random numbers as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a visitor could have changed, by name."""
    found: dict[str, Any] = {"random state": torch.get_rng_state()}
    for name, value in model.state_dict().items():
        found[f"state {name}"] = value.clone()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[f"grad {name}"] = None if grad is None else grad.clone()
        found[f"requires_grad {name}"] = parameter.requires_grad
    for name, module in model.named_modules():
        found[f"training {name}"] = module.training
        hooks = {key: value for key, value in vars(module).items() if "hook" in key}
        assert "_forward_hooks" in hooks, "torch keeps its hooks elsewhere now"
        found[f"hooks {name}"] = {k: len(v) for k, v in hooks.items() if isinstance(v, dict)}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Equal to the last bit."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[name]), f"{name} has changed"
        else:
            assert value == after[name], f"{name} has changed"
