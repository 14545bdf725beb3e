"""What a batch-normalization input is: channels on axis 1, statistics over every other axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "batch_axes",
    "center",
    "check_eps",
    "check_input",
    "check_vector",
    "check_values",
    "count",
    "per_channel",
    "wide_dtype",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_axes(x: Tensor) -> list[int]:
    """Every axis but 1: the batch and the pixels."""
    return [axis for axis in range(x.ndim) if axis != 1]


def count(x: Tensor) -> int:
    """How many values each channel has: the paper's m (m' of section 3.2 with pixels)."""
    return math.prod(x.shape[axis] for axis in batch_axes(x))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values`, of shape (C,), shaped to be broadcast along axis 1 of `x`."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 for the half-precision types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def center(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean`` in the wide type, and the mean of each channel; differentiable in `x`.

    The mean of large values is rounded to a few digits after the point.  What the rounding left is
    the mean of the centered values, and is taken off them; this is what keeps x = 1e6 + noise
    sound.  Subtracting the first, rounded mean as a constant changes no derivative.
    """
    wide = x.to(wide_dtype(x.dtype))
    rounded = wide.detach().mean(batch_axes(x))
    centered = wide - per_channel(rounded, x)
    left = centered.mean(batch_axes(x))
    return centered - per_channel(left, x), rounded + left


def check_input(x: Tensor, name: str = "x") -> None:
    """Refuse what is not a floating-point tensor with a batch axis and a channel axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, allowed are {allowed}; "
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


def check_eps(eps: float) -> None:
    """Refuse a stabilizer that stabilizes nothing."""
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be a positive, finite number, for example 1e-5")


def check_vector(vector: Tensor | None, name: str, x: Tensor) -> None:
    """Refuse a per-channel vector that does not fit `x` in shape or type."""
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(vector).__name__}")
    if vector.shape != (x.shape[1],):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, but x of shape {tuple(x.shape)} has "
            f"{x.shape[1]} channels on axis 1; {name} must have shape ({x.shape[1]},)"
        )
    if vector.dtype not in (x.dtype, wide_dtype(x.dtype)):
        wanted = " or ".join(
            str(d).removeprefix("torch.") for d in dict.fromkeys((x.dtype, wide_dtype(x.dtype)))
        )
        raise TypeError(
            f"{name} has dtype {str(vector.dtype).removeprefix('torch.')}, but x has "
            f"{str(x.dtype).removeprefix('torch.')}; {name} must be {wanted}"
        )
