"""Algorithm 2: the statistics of the population, for a trained network; and what follows from them.

Once they are known, :func:`fold_batch_norm` (of ``bnlib.folding``) removes batch normalization.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.folding import fold_batch_norm

__all__ = ["fold_batch_norm", "population_statistics"]


def population_statistics(
    model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None
) -> nn.Module:
    """Give every batch-normalization layer the statistics of the population, in place.

    Algorithm 2, lines 7 to 12.  The parameters stay as they are; many training mini-batches go
    through the network, and each layer receives

    - as its mean the average of the mini-batch means, E[x] = E_B[mu_B];
    - as its variance the average of the *unbiased* mini-batch variances,
      Var[x] = m / (m - 1) E_B[sigma_B^2], with m values for each channel in a mini-batch.

    Every mini-batch weighs the same, as in the paper.  That estimates the population's statistics
    only if mini-batches are alike, so one with another number of examples, as the last of a
    DataLoader often is, is an error: drop it (``drop_last=True``).

    While statistics are collected, batch-normalization layers normalize with the mini-batch, as
    they did in training.  Everything else is in evaluation mode, whatever mode the model came in:
    dropout is off, as it changes the variance, and the network that infers has none.

    Parameters
    ----------
    model
        Any module with :class:`~bnlib.modules.BatchNorm`,
        :class:`~bnlib.modules.PerActivationBatchNorm` or ``torch.nn.BatchNorm*d`` layers.  It is
        called with one argument.
    batches
        Training mini-batches, of two examples or more: tensors, or tuples and lists whose first
        item is the tensor, such as (images, labels).  Read once; a generator will do.
    device
        Where to move each mini-batch first, for a model that is not on the CPU; None leaves it
        where it is.

    Returns
    -------
    torch.nn.Module
        ``model`` itself, each module in the mode (training or evaluation) it came in: call
        ``.eval()`` before inference.

    Raises
    ------
    ValueError
        If the model has no batch-normalization layer, or one without running statistics, or none
        is reached; if ``batches`` is empty, or its mini-batches have different sizes or a single
        value in each channel; if the statistics are not finite.
    TypeError
        If a mini-batch is neither a tensor nor a tuple or list that begins with one.

    Notes
    -----
    On any error the model is left as it was.  ``num_batches_tracked`` becomes the number of
    mini-batches.  A layer that a forward pass uses several times averages over all its uses; one
    that no forward pass reaches keeps its statistics.  Sums are kept in float64.  Without dropout
    ``torch.optim.swa_utils.update_bn`` computes the same.
    """
    layers = _layers_with_statistics(model)
    saved = {buffer: buffer.clone() for layer in layers for buffer in layer.buffers(recurse=False)}
    sums: dict[Any, tuple[int, Any]] = {}  # of each layer: how many mini-batches; mean and variance

    def add(layer: Any, *_: Any) -> None:
        both = torch.stack([layer.running_mean, layer.running_var])
        count, total = sums.get(layer, (0, 0.0))
        wide = torch.float32 if both.device.type == "mps" else torch.float64
        sums[layer] = count + 1, total + both.to(wide)

    try:
        with contextlib.ExitStack() as restore, torch.no_grad(), _not_compiled():
            for module in model.modules():
                restore.callback(setattr, module, "training", module.training)
                module.training = module in layers
            for layer in layers:
                restore.enter_context(layer.register_forward_hook(add))
                restore.callback(setattr, layer, "momentum", layer.momentum)
                layer.momentum = 1.0  # the running statistics become those of the last mini-batch
                layer.reset_running_stats()  # 0 times an old NaN would be NaN
            for examples in _checked(batches):
                model(examples if device is None else examples.to(device))
            if not sums:
                raise ValueError(
                    "the forward pass of the model, in evaluation mode, reaches none of its "
                    f"batch-normalization layers: {', '.join(layers.values())}"
                )
            for layer, name in layers.items():
                if layer in sums:
                    _write(layer, name, *sums[layer])
                else:
                    for buffer in layer.buffers(recurse=False):
                        buffer.copy_(saved[buffer])
    except BaseException:
        for buffer, value in saved.items():
            buffer.copy_(value)
        raise
    return model


def _not_compiled() -> contextlib.AbstractContextManager[object]:
    """Run compiled models uncompiled, as compiled code would not call the hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _write(layer: Any, name: str, count: int, total: Tensor) -> None:
    for kind, buffer, value in zip(
        ("mean", "variance"), (layer.running_mean, layer.running_var), total / count, strict=True
    ):
        buffer.copy_(value)
        if not bool(buffer.isfinite().all()):
            raise ValueError(
                f"the {kind} of layer {name!r} is not finite in {str(buffer.dtype)[6:]}: the "
                "network or its input overflows there, or holds NaN"
            )
    layer.num_batches_tracked.fill_(count)


def _layers_with_statistics(model: nn.Module) -> dict[_BatchNorm, str]:
    layers = {m: name or "model" for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no batch-normalization layer: neither "
            "bnlib.BatchNorm nor torch.nn.BatchNorm*d"
        )
    for layer, name in layers.items():
        if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) has no running statistics to set; make "
                "it with track_running_stats=True"
            )
    return layers


def _checked(batches: Iterable[Any]) -> Iterable[Tensor]:
    """The examples of each mini-batch, all of one number."""
    size = None
    for index, batch in enumerate(batches):
        examples = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(examples, Tensor):
            raise TypeError(
                f"mini-batch {index} is of type {type(batch).__name__}; it must be a tensor, or a "
                "tuple or list whose first item is one, such as (images, labels)"
            )
        if size not in (None, len(examples)):
            raise ValueError(
                f"mini-batch {index} has {len(examples)} examples, those before it have {size}; "
                "Algorithm 2 averages over mini-batches of one size: leave an incomplete one out, "
                "for example with drop_last=True in the DataLoader"
            )
        size = len(examples)
        yield examples
    if size is None:
        raise ValueError(
            "batches is empty: the statistics of the population need at least one mini-batch (has "
            "a generator been used up before?)"
        )
