"""Networks whose normalization is not that of a new layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def settle(model: nn.Module) -> nn.Module:
    """Give parameters and statistics values that are not those of a new layer."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if norm.running_var is not None:
                norm.running_var.uniform_(0.2, 3, generator=generator)
    return model.double().eval()
