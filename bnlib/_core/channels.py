"""What a batch-normalization input is: channels on axis 1, statistics over every other axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_axes(x: Tensor) -> tuple[int, ...]:
    """Every axis but 1: the batch and the pixels."""
    return (0, *range(2, x.ndim))


def count(x: Tensor) -> int:
    """How many values each channel has: the paper's m (m' of section 3.2 with pixels)."""
    return math.prod((x.shape[0], *x.shape[2:]))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values``, of shape (C,), shaped to be broadcast along axis 1 of ``x``."""
    return values if x.ndim == 2 else values.view(-1, *[1] * (x.ndim - 2))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 for the half-precision types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_input(x: Tensor, name: str = "x") -> None:
    """Refuse what is not a floating-point tensor with a batch axis and a channel axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {_name(x.dtype)}, allowed are {', '.join(map(_name, _DTYPES))}; "
            f"convert it first, for example with {name}.float()"
        )
    if not 2 <= x.ndim <= 5:
        raise ValueError(
            f"{name} has {x.ndim} axes (shape {tuple(x.shape)}); it must be (N, C), (N, C, L), "
            "(N, C, H, W) or (N, C, D, H, W), with the channels on axis 1"
        )


def check_values(x: Tensor) -> None:
    """Refuse a training batch with a single value in each channel."""
    if count(x) == 1:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has a single value in each channel, whose variance is 0 "
            "whatever the value; training needs at least two (a larger batch, or drop_last=True "
            "in the DataLoader), inference goes through batch_norm_inference or .eval()"
        )


def check_eps(eps: float, *, zero: bool = False) -> None:
    """Refuse what cannot stabilize a division by a variance; ``zero`` says whether 0 is allowed."""
    if not (math.isfinite(eps) and (eps > 0 or (zero and eps == 0))):
        allowed = "zero or a positive" if zero else "a positive"
        raise ValueError(f"eps is {eps}; it must be {allowed}, finite number, for example 1e-5")


def check_vector(vector: Tensor | None, name: str, x: Tensor, x_name: str = "x") -> None:
    """Refuse a per-channel vector that does not fit ``x`` in shape or type."""
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(vector).__name__}")
    channels = x.shape[1]
    if vector.shape != (channels,):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, but {x_name} of shape {tuple(x.shape)} has "
            f"{channels} channels on axis 1; {name} must have shape ({channels},)"
        )
    if vector.dtype != x.dtype and vector.dtype != wide_dtype(x.dtype):
        wanted = " or ".join(dict.fromkeys(map(_name, (x.dtype, wide_dtype(x.dtype)))))
        raise TypeError(
            f"{name} has dtype {_name(vector.dtype)}, but {x_name} has {_name(x.dtype)}; "
            f"{name} must be {wanted}"
        )


def check_like(tensor: Tensor, name: str, x: Tensor, x_name: str) -> None:
    """Refuse a gradient that does not have the shape of its tensor."""
    check_input(tensor, name)
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {x_name} has {tuple(x.shape)}; "
            "they must be the same"
        )


def check_population(mean: Tensor, var: Tensor) -> None:
    """Refuse statistics that no data can have, where a look at the values costs nothing."""
    if var.device.type != "cpu":
        return
    for name, values, least in (("mean", mean, -math.inf), ("var", var, 0.0)):
        try:
            lowest, highest = map(float, values.detach().aminmax())
        except RuntimeError:  # without values; or under torch.func.vmap, or of fake tensors
            continue
        if not (math.isfinite(lowest) and math.isfinite(highest) and lowest >= least):
            channel = int((values.isfinite() & (values >= least)).int().argmin())
            raise ValueError(
                f"{name} of channel {channel} is {float(values[channel])}; population statistics "
                "must be finite, and variances not negative. Estimate them anew, for example with "
                "bnlib.population_statistics"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
