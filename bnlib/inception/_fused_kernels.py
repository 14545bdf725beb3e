"""Triton kernels of :mod:`bnlib.inception.fused`: normalization and ReLU in few passes over memory.

What is traded: :mod:`bnlib.functional` says the same in the paper's words and is the place to read.
Here a map is a matrix of ``rows`` values (N H W) by ``channels``, channels last, and the time is
the number of times that it is read or written:

====================  =======================================  ==========================
pass                  reads and writes                         what comes of it
====================  =======================================  ==========================
moments               x                                        mean, variance
normalization         x -> y                                   y = max(0, gamma x_hat + beta)
sums                  x, dl/dy                                 dl/dgamma, dl/dbeta
input gradient        x, dl/dy -> dl/dx                        the compact derivative
====================  =======================================  ==========================

ReLU costs no pass: whether y was positive is computed again from x, so that y is not read.  The
second pass of each pair goes over the map backwards, because the end of it is what the cache still
holds.  A map of few rows takes both passes in one launch, a program for each group of channels.

Statistics are Welford's, in float32, about a pivot: the channel's first value, which is at most
sqrt(m - 1) deviations off the mean.  A mean much larger than the deviation therefore costs no
digits.  Every value has its place in a fixed order of additions, without atomics: the same input
gives the same bits on the same device.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "backward_kernel",
    "differentiate_kernel",
    "forward_kernel",
    "join_moments_kernel",
    "join_sums_kernel",
    "moments_kernel",
    "normalize_kernel",
    "sums_kernel",
]


@triton.jit
def _pivot(x_ptr, cols, inside):
    return tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _moments(x_ptr, pivot, cols, inside, start, rows, tiles, stride,
             BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean (less the pivot) and sum of squared deviations of ``tiles`` tiles from row ``start``."""
    row = tl.arange(0, BLOCK_R)
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    count = 0.0
    for tile in tl.range(tiles, num_stages=3):
        first = start + tile * BLOCK_R
        here = (first + row < rows)[:, None] & inside[None, :]
        x = (
            tl.load(
                x_ptr + first * stride + row[:, None] * stride + cols[None, :], mask=here, other=0.0
            ).to(tl.float32)
            - pivot[None, :]
        )
        count += 1.0
        delta = tl.where(here, x - mean, 0.0)
        mean += delta * (1.0 / count)
        squares += delta * (x - mean)
    # Every row of the tile has its own mean by now, of as many values as there were in its place.
    present = tl.minimum(rows - start, tiles * BLOCK_R)
    counts = ((present - row + BLOCK_R - 1) // BLOCK_R).to(tl.float32)
    counts = tl.where(row < present, counts, 0.0)[:, None]
    together = tl.sum(mean * counts, 0) / present.to(tl.float32)
    apart = mean - together[None, :]
    return together, tl.sum(squares + counts * apart * apart, 0)


@triton.jit
def _settle(mean, squares, pivot, residual_ptr, inv_std_ptr, running_mean_ptr, running_var_ptr,
            cols, inside, rows, momentum, eps):  # fmt: skip
    """Write what later passes need, and move the running statistics; returns 1 / deviation."""
    count = rows.to(tl.float32)
    inv_std = 1.0 / tl.sqrt(squares / count + eps)
    tl.store(residual_ptr + cols, mean, mask=inside)
    tl.store(inv_std_ptr + cols, inv_std, mask=inside)
    old = tl.load(running_mean_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    new = old + momentum * (pivot + mean - old)
    tl.store(running_mean_ptr + cols, new.to(running_mean_ptr.dtype.element_ty), mask=inside)
    old = tl.load(running_var_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    new = old + momentum * (squares / (count - 1.0) - old)
    tl.store(running_var_ptr + cols, new.to(running_var_ptr.dtype.element_ty), mask=inside)
    return inv_std


@triton.jit
def _normalize(x_ptr, y_ptr, pivot, residual, inv_std, gamma, beta, cols, inside, start, rows,
               tiles, x_stride, y_stride, BLOCK_R: tl.constexpr):  # fmt: skip
    row = tl.arange(0, BLOCK_R)
    scale = gamma * inv_std
    for tile in range(tiles):
        first = start + tile * BLOCK_R
        here = (first + row < rows)[:, None] & inside[None, :]
        x = tl.load(
            x_ptr + first * x_stride + row[:, None] * x_stride + cols[None, :],
            mask=here, other=0.0,
        ).to(tl.float32)  # fmt: skip
        y = (x - pivot[None, :] - residual[None, :]) * scale[None, :] + beta[None, :]
        y = tl.where(y <= 0.0, 0.0, y)  # so written that NaN stays
        tl.store(
            y_ptr + first * y_stride + row[:, None] * y_stride + cols[None, :],
            y.to(y_ptr.dtype.element_ty), mask=here,
        )  # fmt: skip


@triton.jit
def _upstream(x_ptr, g_ptr, pivot, residual, scale, beta, cols, here, first, row,
              x_stride, g_stride):  # fmt: skip
    """x - mean, and the derivative with respect to gamma x_hat + beta, of one tile."""
    x = tl.load(
        x_ptr + first * x_stride + row[:, None] * x_stride + cols[None, :], mask=here, other=0.0
    ).to(tl.float32)
    g = tl.load(
        g_ptr + first * g_stride + row[:, None] * g_stride + cols[None, :], mask=here, other=0.0
    ).to(tl.float32)
    x = x - pivot[None, :] - residual[None, :]
    return x, tl.where(x * scale[None, :] + beta[None, :] <= 0.0, 0.0, g)


@triton.jit
def _sums(x_ptr, g_ptr, pivot, residual, scale, beta, cols, inside, start, rows, tiles,
          x_stride, g_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The sums of g and of g (x - mean)."""
    row = tl.arange(0, BLOCK_R)
    plain = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for tile in tl.range(tiles, num_stages=3):
        first = start + tile * BLOCK_R
        here = (first + row < rows)[:, None] & inside[None, :]
        x, g = _upstream(x_ptr, g_ptr, pivot, residual, scale, beta, cols, here, first, row,
                         x_stride, g_stride)  # fmt: skip
        plain += g
        # where a row is missing, x is no value of the map
        weighted += tl.where(here, g * x, 0.0)
    return tl.sum(plain, 0), tl.sum(weighted, 0)


@triton.jit
def _give_gradients(plain, weighted, inv_std, gamma_gradient_ptr, beta_gradient_ptr, cols, inside):
    gradient = weighted * inv_std
    kind = gamma_gradient_ptr.dtype.element_ty
    tl.store(gamma_gradient_ptr + cols, gradient.to(kind), mask=inside)
    tl.store(beta_gradient_ptr + cols, plain.to(beta_gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(x_ptr, g_ptr, out_ptr, pivot, residual, inv_std, gamma, beta, plain, weighted,
                   cols, inside, start, rows, tiles, x_stride, g_stride,
                   BLOCK_R: tl.constexpr):  # fmt: skip
    """gamma / sigma (g - mean(g) - x_hat mean(g x_hat)), the compact derivative."""
    row = tl.arange(0, BLOCK_R)
    scale = gamma * inv_std
    count = rows.to(tl.float32)
    level = plain / count
    slope = weighted * inv_std * inv_std / count
    for tile in range(tiles):
        first = start + tile * BLOCK_R
        here = (first + row < rows)[:, None] & inside[None, :]
        x, g = _upstream(x_ptr, g_ptr, pivot, residual, scale, beta, cols, here, first, row,
                         x_stride, g_stride)  # fmt: skip
        gradient = scale[None, :] * (g - level[None, :] - x * slope[None, :])
        tl.store(
            out_ptr + first * x_stride + row[:, None] * x_stride + cols[None, :],
            gradient.to(out_ptr.dtype.element_ty), mask=here,
        )  # fmt: skip


@triton.jit
def _vector(ptr, cols, inside):
    return tl.load(ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "tiles"])
def moments_kernel(x_ptr, means_ptr, squares_ptr, rows, channels, tiles,
                    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    groups = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // groups
    cols = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    mean, squares = _moments(x_ptr, _pivot(x_ptr, cols, inside), cols, inside,
                             part.to(tl.int64) * tiles * BLOCK_R, rows, tiles, channels,
                             BLOCK_R, BLOCK_C)  # fmt: skip
    tl.store(means_ptr + part * channels + cols, mean, mask=inside)
    tl.store(squares_ptr + part * channels + cols, squares, mask=inside)


@triton.jit(do_not_specialize=["rows", "part_rows", "parts"])
def join_moments_kernel(x_ptr, means_ptr, squares_ptr, residual_ptr, inv_std_ptr,
                         running_mean_ptr, running_var_ptr, rows, channels, part_rows, parts,
                         momentum, eps,
                         BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    part = tl.arange(0, BLOCK_P)
    here = (part < parts)[:, None] & inside[None, :]
    counts = tl.where(part < parts, tl.minimum(rows - part * part_rows, part_rows), 0)
    counts = counts.to(tl.float32)[:, None]
    places = part[:, None] * channels + cols[None, :]
    means = tl.load(means_ptr + places, mask=here, other=0.0)
    squares = tl.load(squares_ptr + places, mask=here, other=0.0)
    mean = tl.sum(means * counts, 0) / rows.to(tl.float32)
    apart = means - mean[None, :]
    squares = tl.sum(squares + counts * apart * apart, 0)
    _settle(mean, squares, _pivot(x_ptr, cols, inside), residual_ptr, inv_std_ptr,
            running_mean_ptr, running_var_ptr, cols, inside, rows, momentum, eps)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(x_ptr, y_ptr, residual_ptr, inv_std_ptr, gamma_ptr, beta_ptr, rows, channels,
                      TILES: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    groups = tl.cdiv(channels, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    cols = program % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    _normalize(x_ptr, y_ptr, _pivot(x_ptr, cols, inside), _vector(residual_ptr, cols, inside),
               _vector(inv_std_ptr, cols, inside), _vector(gamma_ptr, cols, inside),
               _vector(beta_ptr, cols, inside), cols, inside,
               (program // groups).to(tl.int64) * TILES * BLOCK_R, rows, TILES, channels, channels,
               BLOCK_R)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def forward_kernel(x_ptr, y_ptr, residual_ptr, inv_std_ptr, running_mean_ptr, running_var_ptr,
                    gamma_ptr, beta_ptr, rows, channels, tiles, momentum, eps,
                    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    pivot = _pivot(x_ptr, cols, inside)
    start = tl.program_id(0).to(tl.int64) * 0
    mean, squares = _moments(x_ptr, pivot, cols, inside, start, rows, tiles, channels,
                             BLOCK_R, BLOCK_C)  # fmt: skip
    inv_std = _settle(mean, squares, pivot, residual_ptr, inv_std_ptr, running_mean_ptr,
                      running_var_ptr, cols, inside, rows, momentum, eps)  # fmt: skip
    _normalize(x_ptr, y_ptr, pivot, mean, inv_std, _vector(gamma_ptr, cols, inside),
               _vector(beta_ptr, cols, inside), cols, inside, start, rows, tiles, channels,
               channels, BLOCK_R)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def sums_kernel(x_ptr, g_ptr, residual_ptr, inv_std_ptr, gamma_ptr, beta_ptr, plain_ptr,
                 weighted_ptr, rows, channels, g_stride, tiles,
                 BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    groups = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // groups
    cols = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    scale = _vector(gamma_ptr, cols, inside) * _vector(inv_std_ptr, cols, inside)
    plain, weighted = _sums(x_ptr, g_ptr, _pivot(x_ptr, cols, inside),
                            _vector(residual_ptr, cols, inside), scale,
                            _vector(beta_ptr, cols, inside), cols, inside,
                            part.to(tl.int64) * tiles * BLOCK_R, rows, tiles, channels, g_stride,
                            BLOCK_R, BLOCK_C)  # fmt: skip
    tl.store(plain_ptr + part * channels + cols, plain, mask=inside)
    tl.store(weighted_ptr + part * channels + cols, weighted, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def join_sums_kernel(plain_ptr, weighted_ptr, inv_std_ptr, joined_ptr, gamma_gradient_ptr,
                      beta_gradient_ptr, channels, parts,
                      BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    part = tl.arange(0, BLOCK_P)
    here = (part < parts)[:, None] & inside[None, :]
    places = part[:, None] * channels + cols[None, :]
    plain = tl.sum(tl.load(plain_ptr + places, mask=here, other=0.0), 0)
    weighted = tl.sum(tl.load(weighted_ptr + places, mask=here, other=0.0), 0)
    tl.store(joined_ptr + cols, plain, mask=inside)
    tl.store(joined_ptr + channels + cols, weighted, mask=inside)
    _give_gradients(plain, weighted, _vector(inv_std_ptr, cols, inside), gamma_gradient_ptr,
                    beta_gradient_ptr, cols, inside)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def differentiate_kernel(x_ptr, g_ptr, out_ptr, residual_ptr, inv_std_ptr, gamma_ptr, beta_ptr,
                          joined_ptr, rows, channels, g_stride,
                          TILES: tl.constexpr, BLOCK_R: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    groups = tl.cdiv(channels, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    cols = program % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    _differentiate(x_ptr, g_ptr, out_ptr, _pivot(x_ptr, cols, inside),
                   _vector(residual_ptr, cols, inside), _vector(inv_std_ptr, cols, inside),
                   _vector(gamma_ptr, cols, inside), _vector(beta_ptr, cols, inside),
                   _vector(joined_ptr, cols, inside),
                   _vector(joined_ptr + channels, cols, inside), cols, inside,
                   (program // groups).to(tl.int64) * TILES * BLOCK_R, rows, TILES, channels,
                   g_stride, BLOCK_R)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward_kernel(x_ptr, g_ptr, out_ptr, residual_ptr, inv_std_ptr, gamma_ptr, beta_ptr,
                     gamma_gradient_ptr, beta_gradient_ptr, rows, channels, g_stride, tiles,
                     BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < channels
    pivot, residual = _pivot(x_ptr, cols, inside), _vector(residual_ptr, cols, inside)
    inv_std, gamma = _vector(inv_std_ptr, cols, inside), _vector(gamma_ptr, cols, inside)
    beta = _vector(beta_ptr, cols, inside)
    start = tl.program_id(0).to(tl.int64) * 0
    plain, weighted = _sums(x_ptr, g_ptr, pivot, residual, gamma * inv_std, beta, cols, inside,
                            start, rows, tiles, channels, g_stride, BLOCK_R, BLOCK_C)  # fmt: skip
    _give_gradients(plain, weighted, inv_std, gamma_gradient_ptr, beta_gradient_ptr, cols, inside)
    _differentiate(x_ptr, g_ptr, out_ptr, pivot, residual, inv_std, gamma, beta, plain, weighted,
                   cols, inside, start, rows, tiles, channels, g_stride, BLOCK_R)  # fmt: skip
