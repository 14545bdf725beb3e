"""Folding: a batch normalization with fixed statistics is affine, and so is the layer before it.

After a layer whose output is W u + b, Algorithm 2, line 11 gives

    y = s (W u + b - E[x]) + beta = (s W) u + (beta + s (b - E[x])),  s = gamma / sqrt(Var[x] + eps)

so that one layer with other weights computes both.

Which layer comes before which is read from the model's own forward code by ``torch.fx``: it is run
once with a stand-in for the input, and every call of a layer is noted.  The result is the model
itself, copied, not the noted graph: same class, same names, same code.
"""

from __future__ import annotations

import copy
from collections import Counter
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bnlib._core.channels import check_population
from bnlib.modules import BatchNorm, PerActivationBatchNorm

__all__ = ["fold_batch_norm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# A subclass with a forward of its own may do more than normalize, such as a fused activation.
_KNOWN_FORWARDS = tuple(
    kind.forward for kind in (_BatchNorm, SyncBatchNorm, BatchNorm, PerActivationBatchNorm)
)


def fold_batch_norm(model: nn.Module, *, strict: bool = True) -> nn.Module:
    """A copy of the model for inference in which batch normalization has vanished.

    Every batch-normalization layer with running statistics becomes ``torch.nn.Identity``, and the
    layer before it (Linear, Conv1d, Conv2d, Conv3d or a transposed convolution, grouped or not,
    with or without bias) takes over its scale and shift.  The copy is in evaluation mode and has
    the outputs of ``model.eval()`` up to rounding; the model itself is not touched.

    A layer is folded only if that changes no result: if the output of the layer before it goes
    nowhere else, both are used once in a forward pass, and nothing else reads their parameters.

    Parameters
    ----------
    model
        A module whose forward pass ``torch.fx`` can follow: branches, concatenation and nested
        modules are fine; an ``if`` on the values or the shape of a tensor is not, save in a
        submodule without batch normalization, Linear or convolution.  Inputs have a batch axis,
        and a Linear before batch normalization receives (N, features).
    strict
        Whether a batch-normalization layer that cannot be folded is an error.  If False it stays
        as it is, in evaluation mode.

    Returns
    -------
    torch.nn.Module
        The copy.

    Raises
    ------
    ValueError
        If there is no batch-normalization layer; if one has no running statistics, or NaN,
        infinite or negative ones; if the forward pass cannot be followed; and, with ``strict``, if
        a layer cannot be folded.  The message names the layers and the reasons.
    """
    folded = copy.deepcopy(model).eval()
    norms = {m: name for name, m in folded.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        raise ValueError(f"the model ({type(model).__name__}) has no batch-normalization layer")
    for norm, name in norms.items():
        _check_statistics(norm, name)
    graph = _trace(folded)
    plan, reasons = _plan(folded, graph)
    if strict and reasons:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"these batch-normalization layers cannot be folded:\n{listed}\n"
            "With strict=False they stay as they are and the others are folded."
        )
    for norm, layer in plan.items():
        _absorb(layer, norm)
    for parent in list(folded.modules()):
        for name, child in list(parent._modules.items()):  # under every name it has
            if child in plan:
                setattr(parent, name, nn.Identity().eval())
    return folded


def _check_statistics(norm: _BatchNorm, name: str) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"layer {name!r} ({type(norm).__name__}) has no running statistics: it normalizes with "
            "the mini-batch in inference too, which is no fixed map that could be folded; make it "
            "with track_running_stats=True"
        )
    try:
        check_population(norm.running_mean.flatten().cpu(), norm.running_var.flatten().cpu())
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


class _Tracer(fx.Tracer):
    """Notes calls of layers; looks into a module only if something to fold may be inside."""

    proxy_buffer_attributes = True  # so that a forward that reads running_mean itself is noticed
    inside = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name):
            return True
        return not any(isinstance(child, (_BatchNorm, *_FOLDABLE)) for child in m.modules())

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outside, self.inside = self.inside, f"{self.path_of_module(m)} ({type(m).__name__})"
        result = super().call_module(m, forward, args, kwargs)
        self.inside = outside
        return result


def _trace(model: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(model)
    except Exception as error:
        where = f"layer {tracer.inside}" if tracer.inside else f"the model ({type(model).__name__})"
        raise ValueError(
            f"torch.fx cannot follow the forward pass of {where}, so it is not known which layer "
            f"comes before which: {error}"
        ) from error


def _plan(model: nn.Module, graph: fx.Graph) -> tuple[dict[_BatchNorm, nn.Module], dict[str, str]]:
    """Which layer each batch norm folds into; and by name, why others cannot."""
    modules = dict(model.named_modules(remove_duplicate=False))
    called = {n: modules[str(n.target)] for n in graph.nodes if n.op == "call_module"}
    uses = Counter(called.values())
    read = {id(attrgetter(str(n.target))(model)) for n in graph.nodes if n.op == "get_attr"}
    plan: dict[_BatchNorm, nn.Module] = {}
    reasons: dict[str, str] = {}
    for node, norm in called.items():
        if isinstance(norm, _BatchNorm):
            reason = _obstacle(node, called, uses, read)
            if reason is None:
                plan[norm] = called[node.all_input_nodes[0]]
            else:
                reasons.setdefault(str(node.target), reason)
    return plan, reasons


def _obstacle(
    node: fx.Node, called: dict[fx.Node, Any], uses: Counter[nn.Module], read: set[int]
) -> str | None:
    norm, source = called[node], node.all_input_nodes[0]
    layer: Any = called.get(source)
    name = str(source.target)
    if type(layer) not in _FOLDABLE:
        what = f"{name} ({type(layer).__name__})" if layer else name
        return f"its input comes from {what}, not from a plain Linear or convolution layer"
    for module, what in ((norm, "it"), (layer, name)):
        if uses[module] > 1:
            return f"{what} is used {uses[module]} times in a forward pass"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{what} has hooks, which may see or change what folding changes"
        if any(id(t) in read for t in (*module.parameters(), *module.buffers())):
            return f"the forward pass reads parameters of {what} by itself"
    if type(norm).forward not in _KNOWN_FORWARDS:
        return f"{type(norm).__name__} has a forward of its own, which may do more than normalize"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if isinstance(norm, PerActivationBatchNorm) and norm.feature_shape != (channels,):
        return f"it has another (gamma, beta) for each pixel, the weights of {name} do not"
    if norm.num_features != channels:
        return f"it has {norm.num_features} channels, but {name} puts out {channels}"
    if len(source.users) > 1:
        others = ", ".join(str(user) for user in source.users if user is not node)
        return f"the output of {name} goes elsewhere too ({others})"
    return None


@torch.no_grad()
def _absorb(layer: Any, norm: _BatchNorm) -> None:
    """Let ``layer`` compute what ``norm`` would make of its output; in float64, rounded once."""

    def exact(tensor: Tensor | None, default: float) -> Tensor:
        if tensor is None:
            return torch.full((norm.num_features,), default, dtype=torch.float64)
        return tensor.detach().cpu().double().flatten()

    scale = exact(norm.weight, 1) / torch.sqrt(exact(norm.running_var, 1) + norm.eps)
    shift = exact(norm.bias, 0) + scale * (exact(layer.bias, 0) - exact(norm.running_mean, 0))
    weight = layer.weight.detach().cpu().double()
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, *kernel): outputs on the second axis
        grouped = weight.unflatten(0, (layer.groups, -1))
        factors = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (grouped * factors).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    like = layer.weight
    layer.weight = nn.Parameter(weight.to(like), requires_grad=like.requires_grad)
    layer.bias = nn.Parameter(shift.to(like), requires_grad=like.requires_grad)
