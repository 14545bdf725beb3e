"""What comes back through a network: gradients, Jacobians, and covariate shift as gradients see it.

Everything here leaves the model as it was: parameters, buffers, ``.grad`` and the random-number
state are as before when a function returns, and no hook stays. ``layers`` are names or modules, as
in :func:`bnlib.observe.find_layers`; a layer's parameters include those of the modules inside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from bnlib.observe.recorder import find_layers, first_tensor

__all__ = [
    "GradientShift",
    "activation_gradients",
    "gradient_norms",
    "gradient_shift",
    "layer_jacobian",
    "snapshot",
]

Layers = str | nn.Module | Sequence[str | nn.Module]


def _trainable_parameters(model: nn.Module, layers: Layers | None) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each layer; without ``layers``, each module's own."""
    groups = {
        name: [p for p in module.parameters(recurse=layers is not None) if p.requires_grad]
        for name, module in find_layers(model, layers).items()
    }
    empty = [name for name, group in groups.items() if not group]
    if empty and layers is not None:
        raise ValueError(f"layer {empty[0]!r} has no trainable parameter; name layers that have")
    return {name: group for name, group in groups.items() if group}


def gradient_norms(
    loss: Tensor, model: nn.Module, layers: Layers | None = None
) -> dict[str, float]:
    """The norm of the loss's gradient with respect to each layer's parameters, by layer name.

    It is the Euclidean norm over all trainable parameters of the layer, 0 where the loss does not
    depend on them. ``loss`` is a scalar, whose graph is kept, so ``loss.backward()`` may follow.
    Without ``layers``, every module's own parameters count.

    Raises
    ------
    ValueError
        If a layer has no trainable parameter or the loss is not a scalar.
    """
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got the shape {tuple(loss.shape)}; take its mean")
    groups = _trainable_parameters(model, layers)
    every = [parameter for group in groups.values() for parameter in group]
    gradients = iter(
        torch.autograd.grad(
            loss, every, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    return {
        name: float(torch.cat([next(gradients).double().flatten() for _ in group]).norm())
        for name, group in groups.items()
    }


def activation_gradients(
    model: nn.Module, layers: Layers, loss: Callable[[], Tensor]
) -> dict[str, list[Tensor]]:
    """The gradient of the loss with respect to what each layer puts out.

    Parameters
    ----------
    loss
        Runs the model and returns the scalar loss. It is called once, as the caller would.

    Returns
    -------
    dict
        From layer name to one gradient per call of the layer, each of the output's shape
        (for an output of several tensors, its first). Zero where the loss does not depend on it.

    Raises
    ------
    ValueError
        If an output has no gradient, as under ``torch.no_grad``, or a layer was not called.
    """
    modules = find_layers(model, layers)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    calls: list[tuple[str, Any, Tensor]] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or not tensor.requires_grad:
                raise ValueError(f"the output of layer {name!r} carries no gradient")
            # The edge, not the tensor: a following layer may overwrite the tensor in place.
            calls.append((name, get_gradient_edge(tensor), torch.zeros_like(tensor)))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    idle = found.keys() - {name for name, _, _ in calls}
    if idle:
        raise ValueError(f"the loss was computed without calling layer {min(idle)!r}")
    gradients = torch.autograd.grad(value, [edge for _, edge, _ in calls], allow_unused=True)
    for (name, _, zeros), gradient in zip(calls, gradients, strict=True):
        found[name].append(zeros if gradient is None else gradient)
    return found


def _random_state_kept(tensors: Sequence[Tensor]) -> Any:
    return torch.random.fork_rng({t.device.index for t in tensors if t.device.type == "cuda"})


def layer_jacobian(module: nn.Module, x: Tensor, index: int = 0) -> Tensor:
    """The Jacobian of a module's output with respect to its input, for one example of a batch.

    The other examples stand still. In training mode a batch-normalized module sees the batch
    through its statistics, which move with the example; in evaluation mode they are fixed.

    Parameters
    ----------
    module
        A layer or a stack of layers, from one tensor to one tensor, examples along the first axis.
    x
        ``(N, ...)``, floating point; N may be 1.
    index
        Which example; one that is not there is a ValueError.

    Returns
    -------
    Tensor
        ``(outputs, inputs)``, both flattened. ``torch.linalg.svdvals`` gives what section 3.3 of
        the paper speaks of.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point to be differentiated, got {x.dtype}")
    if x.ndim < 2 or not -len(x) <= index < len(x):
        raise ValueError(
            f"x must be a batch (N, ...) that holds example {index}; its shape is {tuple(x.shape)}"
        )
    x = x.detach()
    # Copies, so that running averages are not moved by looking.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def output(example: Tensor) -> Tensor:
        batch = torch.cat([x[:index], example.unsqueeze(0), x[index % len(x) + 1 :]])
        return torch.func.functional_call(module, buffers, (batch,))[index].flatten()

    with _random_state_kept([x]):
        # Row by row: torch.func would refuse layers whose derivative is written by hand.
        return torch.autograd.functional.jacobian(output, x[index]).flatten(1)


class GradientShift(NamedTuple):
    """How one layer's gradient ``G`` changed, to ``G'``, when the layers before it moved."""

    distance: float  #: ``|G - G'|``, Euclidean, in the unit of the gradient
    cosine: float  #: of the angle between ``G`` and ``G'``; NaN where a gradient is zero
    norm: float  #: ``|G|``


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name, for :func:`gradient_shift`."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient_shift(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    layers: Layers | None = None,
) -> dict[str, GradientShift]:
    """How much each layer's gradient changes when only the layers before it take their step.

    The paper defines internal covariate shift through distributions. This is the later definition
    of Santurkar et al. (2018), which asks what the layer that learns would notice.

    Parameters
    ----------
    before, after
        The model's parameters before and after the step, from :func:`snapshot`.
    loss
        Runs the model on one fixed mini-batch and returns the scalar loss. It is called once for
        each layer, always from the same random-number state, so that dropout draws the same mask.
    layers
        Ordered from the input to the output, none inside another; by default every module with
        trainable parameters of its own, in the order of their definition. Parameters of no such
        layer keep their values from before the step.

    Returns
    -------
    dict
        From layer name to its :class:`GradientShift`. The first layer has no earlier layers: its
        distance is 0 and its cosine 1.

    Raises
    ------
    ValueError
        If a snapshot does not fit the model, a layer is unknown or has no trainable parameter,
        or two layers share a parameter.

    Notes
    -----
    S. Santurkar, D. Tsipras, A. Ilyas, A. Madry, "How does batch normalization help
    optimization?", NeurIPS 2018, definition 2.1.
    """
    parameters = dict(model.named_parameters())
    for which, values in (("before", before), ("after", after)):
        wrong = [n for n, p in parameters.items() if n not in values or values[n].shape != p.shape]
        if wrong:
            raise ValueError(
                f"{which} does not fit the model at parameter {wrong[0]!r}; take it with "
                "snapshot(model)"
            )
    groups = _trainable_parameters(model, layers)
    names = {id(p): name for name, p in parameters.items()}
    every = [p for group in groups.values() for p in group]
    twice = [names[i] for i, count in Counter(map(id, every)).items() if count > 1]
    if twice:
        raise ValueError(
            f"two of the layers share the parameter {twice[0]!r}, so neither comes before the "
            "other; name layers that do not overlap"
        )
    shifts: dict[str, GradientShift] = {}
    with _left_as_found(model):
        _assign(parameters, before)
        at_start = iter(_gradient(loss, every))
        for layer, group in groups.items():
            g = torch.cat([next(at_start).flatten() for _ in group])
            moved = torch.cat([grad.flatten() for grad in _gradient(loss, group)]) if shifts else g
            shifts[layer] = _compare(g, moved)
            # From here on this layer is one of the earlier ones.
            _assign({names[id(p)]: p for p in group}, after)
    return shifts


def _compare(g: Tensor, moved: Tensor) -> GradientShift:
    g, moved = g.double(), moved.double()
    norms = float(g.norm() * moved.norm())
    cosine = min(1.0, float(g @ moved) / norms) if norms else float("nan")
    return GradientShift(float((g - moved).norm()), cosine, float(g.norm()))


@torch.no_grad()
def _assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _gradient(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Sequence[Tensor]:
    with _random_state_kept(parameters), torch.enable_grad():
        return torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield
    finally:
        _assign(tensors, copies)
