"""Section 2's failure: normalization whose statistics are computed outside the gradient.

The paper writes x_hat = Norm(x, 𝒳): one argument for the example being normalized, one for all the
examples that the statistics are taken over. The derivative has a part through each. Here they are
two arguments too, so that leaving the second part out is visible where it happens: ``norm(x, x)``
is the true transform, ``norm(x, x.detach())`` is the failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bnlib._core.channels import check_eps, check_input, check_like
from bnlib._core.formulas import center
from bnlib.whitening import whitening_matrix

__all__ = ["KINDS", "Norm", "SplitGradient", "live", "norm", "split_gradient"]

Kind = Literal["center", "scale", "whiten"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class SplitGradient(NamedTuple):
    """The gradient with respect to x, in the two parts of section 2; their sum is the true one."""

    direct: Tensor  #: through ∂Norm/∂x, the statistics taken as constants
    through_examples: Tensor  #: through ∂Norm/∂𝒳, the statistics alone


def norm(x: Tensor, examples: Tensor, kind: Kind = "scale", eps: float = 1e-5) -> Tensor:
    """Norm(x, 𝒳) of section 2: normalize ``x`` with the statistics of ``examples``.

    Parameters
    ----------
    x
        ``(m, d)``: m examples of d activations.
    examples
        ``(n, d)``, n > 1: the paper's 𝒳. The derivative passes through it unless it is detached.
    kind
        ``"center"`` subtracts E[x]. ``"scale"`` also divides each activation by
        sqrt(Var[x] + eps). ``"whiten"`` subtracts E[x] and multiplies by
        (Cov[x] + eps I)^(-1/2), as :func:`bnlib.whitening.whitening_matrix` computes it.
    eps
        Added to variances, in squared units of ``x``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not allowed or the shapes do not fit; when whitening, also if the
        covariance is singular to working precision.
    """
    _check_options(kind, eps)
    check_input(x)
    check_input(examples, "examples")
    if x.ndim != 2 or examples.ndim != 2 or x.shape[1] != examples.shape[1]:
        raise ValueError(
            "x must be (m, d) and examples (n, d), with the same d; got shapes "
            f"{tuple(x.shape)} and {tuple(examples.shape)}"
        )
    if len(examples) < 2:
        raise ValueError(f"statistics take at least two examples; got {len(examples)}")
    if kind == "whiten":
        mean, matrix = whitening_matrix(examples, eps)
        return (x - mean) @ matrix.mT
    deviations, mean = center(examples)
    if kind == "center":
        return x - mean
    return (x - mean) * torch.rsqrt(deviations.square().mean(0) + eps)


def split_gradient(
    x: Tensor, grad: Tensor, kind: Kind = "scale", eps: float = 1e-5
) -> SplitGradient:
    """Backpropagate ``grad``, of the shape of x, through each argument of Norm(x, x) alone."""
    check_like(grad, "grad", x, "x")
    arguments = (x.detach().requires_grad_(), x.detach().requires_grad_())
    return SplitGradient(*torch.autograd.grad(norm(*arguments, kind, eps), arguments, grad))


class Norm(nn.Module):
    """Norm(x, 𝒳) as a layer without parameters, with a choice of what becomes of ∂Norm/∂𝒳.

    There is no running average: in evaluation mode too, 𝒳 is as below, but counts no pass.

    Parameters
    ----------
    kind, eps
        As in :func:`norm`.
    live
        Keep ∂Norm/∂𝒳: 𝒳 is the mini-batch itself, and ``refresh`` has no effect. By default 𝒳 is a
        detached copy of a mini-batch.
    refresh
        How many training passes a detached 𝒳 serves. With 1, each mini-batch is normalized with
        its own statistics, taken as constants; with None, the first mini-batch serves for ever,
        which is frozen batch normalization.
    networks
        ``S`` networks side by side, as in :mod:`bnlib.mnist.stacks`: the activations are
        ``(m, S * d)``, and each group of d is whitened for itself. A group that is no longer finite
        becomes NaN.
    """

    def __init__(
        self,
        kind: Kind = "scale",
        *,
        live: bool = False,
        refresh: int | None = 1,
        networks: int = 1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_options(kind, eps)
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh must be at least 1, or None for never; got {refresh}")
        if networks < 1:
            raise ValueError(f"networks must be at least 1, got {networks}")
        self.kind, self.live, self.refresh = kind, live, refresh
        self.networks, self.eps = networks, eps
        self._examples: Tensor | None = None
        self._passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a mini-batch ``(m, S * d)``; errors as in :func:`norm`."""
        examples = x if self.live else self._detached(x)
        if self.kind != "whiten" or self.networks == 1:
            return norm(x, examples, self.kind, self.eps)
        if x.shape[-1] % self.networks:
            raise ValueError(f"x of shape {tuple(x.shape)} is not {self.networks} equal groups")
        groups = zip(x.chunk(self.networks, 1), examples.chunk(self.networks, 1), strict=True)
        return torch.cat(
            [
                norm(g, e, self.kind, self.eps)
                if g.isfinite().all() and e.isfinite().all()
                else g * math.nan
                for g, e in groups
            ],
            dim=1,
        )

    def _detached(self, x: Tensor) -> Tensor:
        due = self.refresh is not None and self._passes % self.refresh == 0
        if self._examples is None or due:
            self._examples = x.detach()
        self._passes += self.training
        return self._examples


@contextmanager
def live(model: nn.Module) -> Iterator[None]:
    """Within the block, however it ends, every :class:`Norm` of the model keeps ∂Norm/∂𝒳."""
    layers = [module for module in model.modules() if isinstance(module, Norm)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no bnlib.detached.Norm layer")
    before = [layer.live for layer in layers]
    try:
        for layer in layers:
            layer.live = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.live = was


def _check_options(kind: str, eps: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    check_eps(eps, zero=True)
