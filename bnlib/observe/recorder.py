"""What happens inside a network, observed without changing it.

:class:`ActivationRecorder` keeps statistics of what flows in or out of chosen layers of any
``torch.nn.Module``. What comes back through the network is in :mod:`bnlib.observe.gradients`;
functions of a sample alone are in :mod:`bnlib.observe.distributions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnlib.observe.distributions import Moments, moments, percentiles

__all__ = ["ActivationRecorder", "Record", "find_layers", "first_tensor"]


@dataclass(frozen=True)
class Record:
    """Statistics of one call of one layer, on the CPU, detached."""

    shape: tuple[int, ...]  #: shape of the recorded tensor
    percentiles: Tensor  #: (P, units), or (P,) when the recorder pools the units
    moments: Moments  #: each (units,) or a scalar
    samples: Tensor | None = None  #: (n, units) or (n,), a copy of the values, if asked for


def find_layers(
    model: nn.Module, layers: str | nn.Module | Sequence[str | nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Resolve layers, given by name or as modules, to names and modules, in the order given.

    Parameters
    ----------
    layers
        One or several; None for every module that has parameters of its own. The model itself
        has the name ``""``. A module that stands in the model under several names has, when given
        as a module, the first of them.

    Raises
    ------
    ValueError
        For an unknown name or a module that is not part of the model; lists the known names.
    TypeError
        For anything that is neither a name nor a module.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if layers is None:
        return {
            name: module
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }
    found: dict[str, nn.Module] = {}
    for layer in [layers] if isinstance(layers, str | nn.Module) else layers:
        if isinstance(layer, str):
            name: str | None = layer if layer in known else None
        elif isinstance(layer, nn.Module):
            name = next((n for n, module in known.items() if module is layer), None)
        else:
            raise TypeError(f"a layer is a name or a module, got {type(layer).__name__}: {layer!r}")
        if name is None:
            asked = repr(layer) if isinstance(layer, str) else f"this {type(layer).__name__}"
            raise ValueError(f"the model has no layer {asked}; its layers: {_listed(known)}")
        found[name] = known[name]
    if not found:
        raise ValueError(f"layers names no layer; the model's layers: {_listed(known)}")
    return found


def _listed(names: Mapping[str, nn.Module], most: int = 40) -> str:
    shown = [repr(name) for name in list(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


class ActivationRecorder:
    """Keeps statistics of every call of chosen layers, until it is removed.

    Use it as a context manager::

        with ActivationRecorder(model, ["hidden.2"]) as recorder:
            model(x)
        recorder["hidden.2"][0].percentiles  # (3, units), of the first call

    Parameters
    ----------
    model
        Any module. It must call the layers as modules: a layer that the model bypasses
        (``self.layer.weight @ x``) leaves no record.
    layers
        Names in ``model.named_modules()``, or modules, or one of either; ``""`` or the model
        itself is the whole model.
    percentiles
        Which to keep, each from 0 to 100; the default is that of Figure 1.
    of
        ``"output"`` or ``"input"``: which side of the layer. Where that is not one tensor, the
        first tensor in it, keyword arguments last.
    unit_axis
        The axis that counts units (channels), each of which has its own statistics over all
        other axes: 1, as in batch normalization, by default; -1 for transformers. None pools
        all units. A tensor with fewer than two axes is always pooled.
    samples
        Keep this many of each unit's values (evenly spaced ones if there are more), 0 for none.

    Attributes
    ----------
    records
        From layer name to the list of its records, one per call, in the order of the calls.

    Raises
    ------
    ValueError
        For an unknown layer (the message lists the known ones) or a bad option.

    Notes
    -----
    Recording begins with construction. Leaving the ``with`` block, or :meth:`remove`, takes the
    hooks away; the records stay. Entering again goes on recording.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.Module | Sequence[str | nn.Module],
        percentiles: Sequence[float] = (15, 50, 85),
        *,
        of: str = "output",
        unit_axis: int | None = 1,
        samples: int = 0,
    ) -> None:
        if of not in ("output", "input"):
            raise ValueError(f"of must be 'output' or 'input', got {of!r}")
        if not len(percentiles) or not all(0 <= rank <= 100 for rank in percentiles):
            raise ValueError(f"percentiles lie in [0, 100], at least one; got {percentiles!r}")
        if samples < 0:
            raise ValueError(f"samples must be 0 (keep none) or a number to keep, got {samples}")
        self._modules = find_layers(model, layers)
        self._ranks, self._of, self._unit_axis = tuple(percentiles), of, unit_axis
        self._samples = samples
        self.records: dict[str, list[Record]] = {name: [] for name in self._modules}
        self._handles: list[RemovableHandle] = []
        self._attach()

    def __enter__(self) -> ActivationRecorder:
        self._attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getitem__(self, layer: str | nn.Module) -> list[Record]:
        """The records of one layer, given as it was to the constructor."""
        for name, module in self._modules.items():
            if layer is module or layer == name:
                return self.records[name]
        raise KeyError(f"{layer!r} is not recorded; recorded: {_listed(self._modules)}")

    def remove(self) -> None:
        """Take the hooks away, leaving the model as it was. Doing it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self) -> None:
        if self._handles:
            return
        for name, module in self._modules.items():
            hook = self._hook(name)
            if self._of == "output":
                handle = module.register_forward_hook(hook)
            else:
                # Before the call: a layer that works in place would show its output instead.
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.append(handle)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, last: Any) -> None:
            # The last argument is the output after the call, and the keyword arguments before it.
            self._record(name, last if self._of == "output" else (arguments, last))

        return hook

    @torch.no_grad()
    def _record(self, name: str, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is None:
            raise TypeError(
                f"the {self._of} of layer {name!r} holds no tensor to record: it is a "
                f"{type(value).__name__}"
            )
        x = tensor.detach()
        if self._unit_axis is None or x.ndim < 2:
            x = x.reshape(-1)
        else:
            if not -x.ndim <= self._unit_axis < x.ndim:
                raise ValueError(
                    f"unit_axis={self._unit_axis} is no axis of the {self._of} of layer {name!r}, "
                    f"whose shape is {tuple(x.shape)}"
                )
            x = x.movedim(self._unit_axis, -1).flatten(0, -2)
        record = Record(
            shape=tuple(tensor.shape),
            percentiles=percentiles(x, self._ranks, dim=0).cpu(),
            moments=Moments(*(moment.cpu() for moment in moments(x, dim=0))),
            samples=_evenly(x, self._samples).cpu() if self._samples else None,
        )
        self.records[name].append(record)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of tuples, lists and mappings; None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return None
    return next((tensor for item in value if (tensor := first_tensor(item)) is not None), None)


def _evenly(x: Tensor, most: int) -> Tensor:
    """A copy of at most ``most`` rows, evenly spaced: no random numbers are drawn."""
    if len(x) <= most:
        return x.clone()
    return x[torch.arange(most, device=x.device) * len(x) // most]
