"""The arithmetic of batch normalization in as few trips to memory as tensor operations allow.

What is traded: ``bnlib.functional`` says the same in the paper's words and is the place to read.
This file computes it for ``batch_norm`` at the speed of a hand-written kernel, by three devices.

Blocks.  A large tensor does not fit into the cache, and a temporary of its size costs more in fresh
    pages than the arithmetic on it.  Every loop here goes over blocks that stay in the cache, and
    the temporaries of one block serve the next.  (A GPU takes the whole tensor as one block.)

One view for two layouts.  A tensor stored channel by channel is read as (N, C, pixels), one stored
    with its channels last as (N * pixels, C, 1).  Such a view is called ``rows`` below.

A pivot where it is needed.  E[x^2] - E[x]^2 loses the digits of mean^2 / var.  Where that ratio is
    at most ``_SAFE_RATIO`` in every channel, one pass over x gives mean and variance, and
    ``x * scale + shift`` is as good as ``(x - mean) * scale``.  Otherwise ``x - pivot`` takes the
    place of x in every formula, with the mean as the pivot: the two-pass algorithm, corrected for
    the rounding of the mean.  A look at the ratio would make a GPU wait; there it is always taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnlib._channels import wide_dtype

__all__ = ["Gradients", "Moments", "affine", "gradients", "moments", "pivot"]

_BLOCK = 2**17  # elements of a block, for each thread: 512 kB in float32, half a usual L2 cache
_SAFE_RATIO = 64.0


class Moments(NamedTuple):
    """Mean, as pivot + residual, and biased variance of each channel; without a pivot it is 0."""

    pivot: Tensor | None
    residual: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """Derivatives of the loss with respect to x, gamma and beta."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


def moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel of ``x``, which has at least one value in each."""
    rows = _rows(x, _channels_last(x))
    m = rows.shape[0] * rows.shape[2]
    if x.device.type == "cpu":
        mean, square = (total / m for total in _sums(rows, None))
        var = square - mean.square()
        if pivot(mean, var)[0] is None:
            return Moments(None, mean, var)
    else:
        mean = rows.mean((0, 2), dtype=wide_dtype(x.dtype))
    residual, square = (total / m for total in _sums(rows, mean))
    return Moments(mean, residual, (square - residual.square()).clamp_(min=0))


def pivot(mean: Tensor, var: Tensor) -> tuple[Tensor | None, Tensor]:
    """``mean`` as pivot + residual: all residual where it is safe not to have a pivot."""
    # So written that NaN, from squares that overflow, takes the careful way.
    if mean.device.type == "cpu" and bool((mean.square() <= _SAFE_RATIO * var).all()):
        return None, mean
    return mean, torch.zeros_like(mean)


def affine(x: Tensor, pivot: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - pivot) * scale + shift`` in the type and layout of ``x``."""
    channels_last = _channels_last(x)
    result = _empty(x, channels_last)
    rows, out = _rows(x, channels_last), _rows(result, channels_last)
    one_step, pivot, scale, shift = _one_step(rows), _column(pivot), scale[:, None], shift[:, None]
    size, buffer = _buffer(rows)
    for block, target in zip(rows.split(size), out.split(size), strict=True):
        scratch = buffer if len(block) == size else buffer[: len(block)]
        y = target if target.dtype == buffer.dtype else scratch
        _multiply_add(_load(block, pivot, scratch), scale, shift, y, one_step)
        if y is not target:
            target.copy_(y)
    return result


def gradients(
    grad_y: Tensor,
    x: Tensor,
    pivot: Tensor | None,
    residual: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
) -> Gradients:
    """The compact derivative.

    With ``x_hat = (d - residual) * inv_std`` and ``d = x - pivot``, the derivative with respect to
    x, ``gamma * inv_std * (g - mean(g) - x_hat * mean(g * x_hat))``, is ``slope * d + level +
    scale * g`` with three numbers a channel.
    """
    channels_last = _channels_last(x)
    result = _empty(x, channels_last)
    rows, upstream, out = (_rows(t, channels_last) for t in (x, grad_y, result))
    m = rows.shape[0] * rows.shape[2]

    grad_beta, products = _sums(rows, pivot, upstream)
    grad_gamma = (products - residual * grad_beta) * inv_std
    scale = gamma * inv_std
    slope = -scale * inv_std * grad_gamma / m
    level = (-scale * grad_beta / m - slope * residual)[:, None]

    one_step, pivot, scale, slope = _one_step(rows), _column(pivot), scale[:, None], slope[:, None]
    size, buffer = _buffer(rows)
    other = torch.empty_like(buffer)
    for block, g, target in zip(*(t.split(size) for t in (rows, upstream, out)), strict=True):
        scratch = buffer if len(block) == size else buffer[: len(block)]
        spare = other if len(block) == size else other[: len(block)]
        total = target if target.dtype == buffer.dtype else scratch
        _multiply_add(_load(block, pivot, scratch), slope, level, total, one_step)
        g = _load(g, None, spare)
        if one_step:
            total.addcmul_(g, scale)
        else:
            total.add_(torch.mul(g, scale, out=spare))
        if total is not target:
            target.copy_(total)
    return Gradients(result, grad_gamma, grad_beta)


def _sums(rows: Tensor, pivot: Tensor | None, other: Tensor | None = None) -> list[Tensor]:
    """The sums of w and of w * d for each channel, where d = x - pivot and w is d or ``other``."""
    pivot = _column(pivot)
    size, buffer = _buffer(rows)
    second = torch.empty_like(buffer)
    blocks = rows.split(size)
    weights = blocks if other is None else other.split(size)
    sums = buffer.new_empty((2, len(blocks), rows.shape[1]))
    for block, weight, total, product in zip(blocks, weights, *sums, strict=True):
        scratch = buffer if len(block) == size else buffer[: len(block)]
        d = _load(block, pivot, scratch)
        w = d if other is None else _load(weight, None, second[: len(block)])
        torch.sum(w, (0, 2), out=total)
        torch.sum(torch.mul(w, d, out=scratch), (0, 2), out=product)
    return [total.sum(0) for total in sums]  # new tensors: autograd keeps track of views


def _multiply_add(d: Tensor, scale: Tensor, shift: Tensor, out: Tensor, one_step: bool) -> None:
    if one_step:
        torch.addcmul(shift, d, scale, out=out)
    else:
        torch.mul(d, scale, out=out).add_(shift)


def _one_step(rows: Tensor) -> bool:
    """Whether addcmul is fast: on the CPU it is not where the parameters repeat along pixels."""
    return rows.shape[2] == 1 or rows.device.type != "cpu"


def _load(block: Tensor, pivot: Tensor | None, scratch: Tensor) -> Tensor:
    """``block - pivot`` in the type of ``scratch``; in its memory unless ``block`` will do."""
    if pivot is not None:
        return torch.sub(block, pivot, out=scratch)
    return block if block.dtype == scratch.dtype else scratch.copy_(block)


def _column(values: Tensor | None) -> Tensor | None:
    return None if values is None else values[:, None]


def _buffer(rows: Tensor) -> tuple[int, Tensor]:
    """How many rows make a block, and memory for one block in the type to compute in."""
    size = max(1, len(rows))
    if rows.device.type == "cpu":
        row = max(1, rows.shape[1] * rows.shape[2])
        size = min(size, max(1, _BLOCK * torch.get_num_threads() // row))
    return size, rows.new_empty((size, *rows.shape[1:]), dtype=wide_dtype(rows.dtype))


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    n, c, *trailing = x.shape
    if channels_last:
        return x.movedim(1, -1).reshape(n * math.prod(trailing), c, 1)
    return x.reshape(n, c, math.prod(trailing))


def _empty(x: Tensor, channels_last: bool) -> Tensor:
    """Memory for a result of the shape, type and layout of ``x``."""
    n, c, *trailing = x.shape
    return x.new_empty((n, *trailing, c)).movedim(-1, 1) if channels_last else x.new_empty(x.shape)
