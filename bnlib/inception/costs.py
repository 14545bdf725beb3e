"""What the parts of a network cost: parameters, output sizes and multiply-adds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from bnlib.inception.architecture import BNInception

__all__ = ["ModuleCost", "module_costs"]


class ModuleCost(NamedTuple):
    """One part of a network, and what it costs for one image."""

    name: str  #: as in ``named_modules``, such as ``inception.3a``
    parameters: int  #: trainable scalars
    output: tuple[int, ...]  #: its shape, (channels, height, width) or (features,)
    multiply_adds: int  #: multiplications, each with its addition


def module_costs(model: BNInception, image_size: int | tuple[int, int] = 224) -> list[ModuleCost]:
    """Parameters, output shape and multiply-adds of every part of the network.

    Nothing is computed: a copy of the network runs on PyTorch's ``meta`` device, where tensors have
    shapes but no values, and ``torch.utils.flop_counter`` counts convolutions and matrix products,
    as is usual in the literature; normalization, activations, pooling and biases, a few percent
    more, are not counted.

    Parameters
    ----------
    model
        The network, which is not changed.  Its modules may have been exchanged for others.
    image_size
        Height and width of the images, in pixels.

    Returns
    -------
    list of ModuleCost
        The parts in the order in which they run: layers of the stem, Inception modules as in
        Figure 5, global pooling, classifier.  Parts that return their input itself are left out.
        Parameters and multiply-adds add up to those of the network.

    Raises
    ------
    TypeError, ValueError
        If ``model`` is another network, or the images are smaller than it takes.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a second

    if not isinstance(model, BNInception):
        raise TypeError(f"model is a {type(model).__name__}; costs are counted for a BNInception")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = 2  # per-activation normalization needs two in training
    copied = copy.deepcopy(model).to("meta")
    parts = dict(_parts(copied))
    outputs: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if output is not inputs[0]:
            outputs[name] = tuple(output.shape[1:])

    for name, part in parts.items():
        part.register_forward_hook(functools.partial(record, name))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copied(torch.empty(images, copied.images.channels, height, width, device="meta"))
    flops = counter.get_flop_counts()  # by module, then by operation
    root = type(copied).__name__
    costs = []
    for name, output in outputs.items():
        parameters = sum(p.numel() for p in parts[name].parameters())
        total = sum(flops.get(f"{root}.{name}", {}).values())  # two for each multiply-add
        costs.append(ModuleCost(name, parameters, output, total // (2 * images)))
    return costs


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's children; a ModuleDict stands for its entries."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", entry) for key, entry in child.items())
        else:
            yield name, child
