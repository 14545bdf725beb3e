"""The arithmetic of ``bnlib._core.formulas``, the place to read it, in fewer trips to memory.

Large tensors take a fifth of the time.  Each operation passes over a block once, nine passes in
all, where one fused kernel would need four (``benchmarks/batch_norm.py`` measures both).

Blocks.  A temporary of the size of a large tensor costs more in fresh pages than the arithmetic on
    it.  Every loop here goes over blocks that stay in the cache, and the temporaries of one block
    serve the next.  (A GPU takes the whole tensor as one block.)

One view for two layouts.  A tensor stored channel by channel is read as (N, C, pixels), one stored
    with its channels last as (N * pixels, C, 1).  Such a view is called ``rows`` below.

A pivot where it is needed.  E[x^2] - E[x]^2 loses the digits of mean^2 / var.  Where that ratio is
    at most ``_SAFE_RATIO`` in every channel, one pass over x gives mean and variance.  Otherwise,
    and on a GPU, which a look at the ratio would make wait, ``x - pivot`` takes the place of x in
    every formula: the two-pass algorithm, corrected for the rounding of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnlib._core.channels import wide_dtype

_BLOCK = 2**18  # elements of a block, for each thread; 2**16 to 2**19 measure much alike
_SAFE_RATIO = 64.0


def moments(x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Mean of each channel, as pivot + residual, and biased variance; without a pivot it is 0."""
    rows = _rows(x, _channels_last(x))
    m = rows.shape[0] * rows.shape[2]
    if x.device.type == "cpu":
        mean, square = (total / m for total in _sums(rows, None))
        var = square - mean.square()
        if pivot(mean, var)[0] is None:
            return None, mean, var
    else:
        mean = rows.mean((0, 2), dtype=wide_dtype(x.dtype))
    residual, square = (total / m for total in _sums(rows, mean))
    return mean, residual, (square - residual.square()).clamp_(min=0)


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
    wide = wide_dtype(x.dtype)
    pivot, scale, shift = _column(pivot), scale[:, None], shift[:, None]
    for scratch, _, block, target in _blocks(rows, out):
        d = _load(block, pivot, wide, scratch)
        y = _multiply_add(d, scale, shift, target if target.dtype == wide else scratch)
        if target.dtype != wide:
            target.copy_(y)
    return result


def gradients(
    grad_y: Tensor,
    x: Tensor,
    pivot: Tensor | None,
    residual: Tensor,
    inv_std: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compact derivative, with respect to x, gamma and beta.

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
    slope = scale * inv_std * grad_gamma / -m
    level = scale * grad_beta / -m - slope * residual

    wide = wide_dtype(x.dtype)
    pivot, slope, level, scale = _column(pivot), slope[:, None], level[:, None], scale[:, None]
    for scratch, other, block, g, target in _blocks(rows, upstream, out):
        d = _load(block, pivot, wide, scratch)
        total = _multiply_add(d, slope, level, target if target.dtype == wide else scratch)
        g = _load(g, None, wide, other)
        if _one_step(g):
            total.addcmul_(g, scale)
        else:
            total.add_(torch.mul(g, scale, out=other))
        if target.dtype != wide:
            target.copy_(total)
    return result, grad_gamma, grad_beta


def _sums(rows: Tensor, pivot: Tensor | None, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sums of w and of w * d for each channel, where d = x - pivot and w is d or ``other``."""
    pivot, wide = _column(pivot), wide_dtype(rows.dtype)
    parts = []
    for scratch, spare, block, weight in _blocks(rows, rows if other is None else other):
        d = _load(block, pivot, wide, scratch)
        w = d if other is None else _load(weight, None, wide, spare)
        parts.append((w.sum((0, 2)), torch.mul(w, d, out=scratch).sum((0, 2))))
    if len(parts) == 1:
        return parts[0]
    first, second = zip(*parts, strict=True)
    return torch.stack(first).sum(0), torch.stack(second).sum(0)


def _blocks(*rows: Tensor) -> Iterator[Any]:
    """Two scratch memories, for blocks in the wide type, and the blocks of each of ``rows``.

    Where one block is all there is, both memories are None and operations bring their own.
    """
    n, c, pixels = rows[0].shape
    size = n
    if rows[0].device.type == "cpu":
        size = max(1, _BLOCK * torch.get_num_threads() // max(1, c * pixels))
    if n <= size:
        yield None, None, *rows
        return
    one, two = rows[0].new_empty((2, size, c, pixels), dtype=wide_dtype(rows[0].dtype))
    for blocks in zip(*(t.split(size) for t in rows), strict=True):
        rest = len(blocks[0])
        yield (one, two, *blocks) if rest == size else (one[:rest], two[:rest], *blocks)


def _multiply_add(d: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
    if _one_step(d):
        return torch.addcmul(shift, d, scale, out=out)
    return torch.mul(d, scale, out=out).add_(shift)


def _one_step(block: Tensor) -> bool:
    """Whether addcmul is fast: on the CPU it is not where the parameters repeat along pixels."""
    return block.shape[2] == 1 or block.device.type != "cpu"


def _load(block: Tensor, pivot: Tensor | None, wide: torch.dtype, scratch: Tensor | None) -> Tensor:
    """``block - pivot`` in the wide type: in ``scratch`` if there is one, and if need be."""
    if pivot is not None:
        return torch.sub(block, pivot, out=scratch)
    if block.dtype == wide or scratch is None:
        return block.to(wide)
    return scratch.copy_(block)


def _column(values: Tensor | None) -> Tensor | None:
    return None if values is None else values[:, None]


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
