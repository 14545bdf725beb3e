"""What the parts of a network cost: parameters, output sizes and multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from bnlib.inception.architecture import BNInception

__all__ = ["ModuleCost", "module_costs"]


class ModuleCost(NamedTuple):
    """One part of a network, and what it costs.

    Attributes
    ----------
    name
        As in ``named_modules``: ``conv1``, ``inception.3a``, ``fc``.
    parameters
        Trainable scalars.
    output
        Shape of what it returns for one image: (channels, height, width), or (features,).
    multiply_adds
        Multiplications, each with its addition, for one image.
    """

    name: str
    parameters: int
    output: tuple[int, ...]
    multiply_adds: int


def module_costs(model: BNInception, image_size: int | tuple[int, int] = 224) -> list[ModuleCost]:
    """Parameters, output shape and multiply-adds of every part of the network.

    Nothing is computed: a copy of the network runs on PyTorch's ``meta`` device, where tensors have
    shapes but no values, and ``torch.utils.flop_counter`` counts.

    Parameters
    ----------
    model
        The network; also one in which modules were exchanged.  It is not touched.  In training
        mode the auxiliary head, if there is one, is counted; in evaluation mode it does not run.
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
    TypeError
        If ``model`` is no :class:`~bnlib.inception.architecture.BNInception`.
    ValueError
        If the images are smaller than the network takes.

    Notes
    -----
    One multiply-add is half of what PyTorch's counter calls two floating-point operations.  Counted
    are convolutions and matrix products, as usual in the literature; normalization, activations,
    pooling and biases are not, which are a few percent more.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a second

    if not isinstance(model, BNInception):
        raise TypeError(f"model is a {type(model).__name__}; costs are counted for a BNInception")
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    copied = copy.deepcopy(model).to("meta")
    counter = FlopCounterMode(display=False)
    costs: list[ModuleCost] = []
    before: dict[str, int] = {}

    def attach(name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, inputs: Any) -> None:
            before[name] = counter.get_total_flops()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if output is inputs[0]:
                return
            flops = counter.get_total_flops() - before[name]
            parameters = sum(p.numel() for p in module.parameters())
            costs.append(
                ModuleCost(name, parameters, tuple(output.shape[1:]), flops // (2 * images))
            )

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    images = 2  # per-activation normalization needs two in training
    for name, module in _parts(copied):
        attach(name, module)
    with torch.no_grad(), counter:
        copied(torch.empty(images, copied.images.channels, *size, device="meta"))
    return costs


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's children; a ModuleDict stands for its entries."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", entry) for key, entry in child.items())
        else:
            yield name, child
