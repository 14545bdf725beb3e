"""How the kernels of fused normalization and ReLU are started: how a map is divided among programs.

Imports Triton, so that only :mod:`bnlib.inception.fused` imports this, when it is needed.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bnlib.inception import _fused_kernels as kernels

__all__ = ["INTERPRETED", "ONE_LAUNCH", "backward", "forward"]

#: Whether the kernels run in Triton's interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Rows up to which both passes are one launch.
ONE_LAUNCH = 2048

_TILE = 2048  # values of a tile: 16 for each thread of four warps
_TILES = 4  # of a program in an elementwise pass
_MOST_PARTS = 512  # programs that share the rows of a reduction


class _Plan(NamedTuple):
    """A reduction: for each group of channels ``parts`` programs of ``tiles`` tiles each."""

    block_r: int
    block_c: int
    groups: int
    parts: int
    tiles: int


@lru_cache(maxsize=4096)
def _plan(rows: int, channels: int, device: torch.device) -> _Plan:
    block_c = next((c for c in (64, 32) if channels % c == 0), 0)
    block_c = block_c or min(64, triton.next_power_of_2(channels))
    block_r = _TILE // block_c
    groups, tiles = triton.cdiv(channels, block_c), triton.cdiv(rows, block_r)
    # four programs stand side by side on a multiprocessor
    at_once = 8 if device.type == "cpu" else 4 * _multiprocessors(device)
    most = max(1, min(_MOST_PARTS, at_once // groups))
    of_each = triton.cdiv(tiles, most)
    return _Plan(block_r, block_c, groups, triton.cdiv(tiles, of_each), of_each)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _one_launch(rows: int, channels: int) -> tuple[int, dict[str, int]]:
    """Programs, and the blocks of each: a sector of 32 bytes of each row, or of 16-bit values."""
    block_c = min(16, triton.next_power_of_2(channels))
    block_r = min(2 * _TILE // block_c, max(16, triton.next_power_of_2(rows)))
    return triton.cdiv(channels, block_c), {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 8}


def _join(channels: int, parts: int) -> tuple[int, dict[str, int]]:
    block_p, block_c = max(16, triton.next_power_of_2(parts)), 16
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8 if block_p > 128 else 4}
    return triton.cdiv(channels, block_c), blocks


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    one_launch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize and cut off, and move the running statistics.

    Parameters
    ----------
    x
        (rows, channels), contiguous, of two rows or more.
    gamma, beta, running_mean, running_var
        (channels,), contiguous.
    momentum, eps
        As in torch.
    one_launch
        Whether one program makes both passes over its channels.

    Returns
    -------
    tuple of torch.Tensor
        y like ``x``; the mean less the first row, and 1 / deviation: float32 (channels,).
    """
    rows, channels = x.shape
    y = torch.empty_like(x)
    residual, inv_std = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    running = running_mean, running_var
    with torch.cuda.device_of(x):
        if one_launch:
            programs, blocks = _one_launch(rows, channels)
            tiles = triton.cdiv(rows, blocks["BLOCK_R"])
            kernels.forward_kernel[(programs,)](
                x, y, residual, inv_std, *running, gamma, beta, rows, channels, tiles, momentum,
                eps, **blocks,
            )  # fmt: skip
            return y, residual, inv_std
        plan = _plan(rows, channels, x.device)
        sizes = {"BLOCK_R": plan.block_r, "BLOCK_C": plan.block_c}
        means, squares = x.new_empty((2, plan.parts, channels), dtype=torch.float32)
        kernels.moments_kernel[(plan.groups * plan.parts,)](
            x, means, squares, rows, channels, plan.tiles, **sizes
        )
        programs, blocks = _join(channels, plan.parts)
        kernels.join_moments_kernel[(programs,)](
            x, means, squares, residual, inv_std, *running, rows, channels,
            plan.tiles * plan.block_r, plan.parts, momentum, eps, **blocks,
        )  # fmt: skip
        programs = plan.groups * triton.cdiv(rows, plan.block_r * _TILES)
        kernels.normalize_kernel[(programs,)](
            x, y, residual, inv_std, gamma, beta, rows, channels, TILES=_TILES, **sizes
        )
    return y, residual, inv_std


def backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor,
    inv_std: Tensor,
    one_launch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives with respect to x, gamma and beta.

    Parameters
    ----------
    grad_y
        Like ``x``; its rows may be parts of longer ones, as they are behind a concatenation.
    x, gamma, beta, one_launch
        As given to :func:`forward`.
    residual, inv_std
        As it returned them.
    """
    rows, channels = x.shape
    grad_x, grad_gamma, grad_beta = map(torch.empty_like, (x, gamma, beta))
    stride = grad_y.stride(0)
    with torch.cuda.device_of(x):
        if one_launch:
            programs, blocks = _one_launch(rows, channels)
            tiles = triton.cdiv(rows, blocks["BLOCK_R"])
            kernels.backward_kernel[(programs,)](
                x, grad_y, grad_x, residual, inv_std, gamma, beta, grad_gamma, grad_beta, rows,
                channels, stride, tiles, **blocks,
            )  # fmt: skip
            return grad_x, grad_gamma, grad_beta
        plan = _plan(rows, channels, x.device)
        sizes = {"BLOCK_R": plan.block_r, "BLOCK_C": plan.block_c}
        plain, weighted = x.new_empty((2, plan.parts, channels), dtype=torch.float32)
        kernels.sums_kernel[(plan.groups * plan.parts,)](
            x, grad_y, residual, inv_std, gamma, beta, plain, weighted, rows, channels, stride,
            plan.tiles, **sizes,
        )  # fmt: skip
        joined = x.new_empty((2, channels), dtype=torch.float32)
        programs, blocks = _join(channels, plan.parts)
        kernels.join_sums_kernel[(programs,)](
            plain, weighted, inv_std, joined, grad_gamma, grad_beta, channels, plan.parts, **blocks
        )
        programs = plan.groups * triton.cdiv(rows, plan.block_r * _TILES)
        kernels.differentiate_kernel[(programs,)](
            x, grad_y, grad_x, residual, inv_std, gamma, beta, joined, rows, channels, stride,
            TILES=_TILES, **sizes,
        )  # fmt: skip
    return grad_x, grad_gamma, grad_beta
