"""The least that a training step must move and compute, counted from a network's own layers.

For each layer and image, in 16-bit values and multiply-adds, where ``i`` and ``o`` are the values
that it reads and writes:

* convolution, classifier: forward i + o; derivative of the input o + i (not of the first layer);
  derivative of the weights i + o.  Operations: twice its multiply-adds for each of the three;
* batch normalization with its ReLU: forward o + o; backward x and dl/dy in, dl/dx out.  The passes
  that take its statistics and its sums are not counted: the operation that writes a map could take
  them on the way, although no library does;
* pooling: forward i + o; backward o + i, and once more i to find the maximum again;
* concatenation, the additions of gradients where branches meet, the loss: nothing.

For each step and parameter 32 bytes: the weights read in float32, written and twice read in 16 bits
(8 + 2), a gradient written (4), and SGD with momentum: weight, gradient and momentum read, two
written (20), less the 2 that a read of the weights shares.

A layer takes the longer of two times, its bytes at the bandwidth of a copy and its operations at
the rate of a large matrix product; the floor is the sum, as layers come one after another.  What
it leaves out makes it too low.  One thing makes it too high: maps that stay in the cache between
two layers move at less than their bytes, which at small mini-batches is most of them.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

VALUE = 2  # bytes
FOR_EACH_PARAMETER = 32  # bytes a step


class Work(NamedTuple):
    """What one layer costs for one image: values read and written, and operations."""

    kind: str
    values: int
    operations: int


class Machine(NamedTuple):
    """Measured ceilings."""

    bytes_per_s: float
    operations_per_s: float


def work(network: nn.Module, size: int) -> list[Work]:
    """The cost of every layer for one image of ``size`` x ``size``; nothing is computed."""
    copied = copy.deepcopy(network).to("meta").train()
    found: list[Work] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        read, written = inputs[0][0].numel(), output[0].numel()
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            multiply_adds = written * layer.weight[0].numel()
            passes = 2 if inputs[0].shape[1] == 3 else 3  # images need no derivative
            found.append(Work("product", passes * (read + written), passes * 2 * multiply_adds))
        elif isinstance(layer, _BatchNorm):
            found.append(Work("normalization", 5 * written, 0))
        else:
            again = 0 if "Avg" in type(layer).__name__ else read
            found.append(Work("pooling", 2 * (read + written) + again, 0))

    pools = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
    for layer in copied.modules():
        kinds = (nn.Conv2d, nn.Linear, _BatchNorm, *pools)
        if isinstance(layer, kinds) or type(layer).__name__ == "StridedMaxPool":
            layer.register_forward_hook(note)
    with torch.no_grad():
        copied(torch.empty(2, 3, size, size, device="meta"))
    return found


def step_bytes(network: nn.Module, batch: int, size: int) -> float:
    """Bytes of one step."""
    parameters = sum(p.numel() for p in network.parameters())
    values = sum(layer.values for layer in work(network, size))
    return VALUE * batch * values + FOR_EACH_PARAMETER * parameters


def step_seconds(network: nn.Module, batch: int, size: int, machine: Machine) -> float:
    """The floor: what one step takes at least."""
    parameters = sum(p.numel() for p in network.parameters())
    seconds = FOR_EACH_PARAMETER * parameters / machine.bytes_per_s
    for layer in work(network, size):
        moving = VALUE * batch * layer.values / machine.bytes_per_s
        seconds += max(moving, batch * layer.operations / machine.operations_per_s)
    return seconds
