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
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnlib._core.channels import check_input, check_ridge
from bnlib._core.formulas import center
from bnlib.whitening import whitening_matrix

__all__ = ["KINDS", "Norm", "SplitGradient", "live", "norm", "split_gradient"]

Kind = Literal["center", "scale", "whiten"]
KINDS = ("center", "scale", "whiten")


class SplitGradient(NamedTuple):
    """The gradient with respect to x, in the two parts of section 2; their sum is the true one.

    Attributes
    ----------
    direct
        Through ∂Norm/∂x, the statistics taken as constants.
    through_examples
        Through ∂Norm/∂𝒳, the statistics alone.
    """

    direct: Tensor
    through_examples: Tensor


def norm(x: Tensor, examples: Tensor, kind: Kind = "scale", eps: float = 1e-5) -> Tensor:
    """Norm(x, 𝒳) of section 2: normalize ``x`` with the statistics of ``examples``.

    Parameters
    ----------
    x
        ``(m, d)``: m examples of d activations, in float32 or float64.
    examples
        ``(n, d)``, n > 1: the paper's 𝒳. The derivative passes through it unless it is detached.
    kind
        ``"center"`` subtracts E[x]. ``"scale"`` also divides each activation by
        sqrt(Var[x] + eps). ``"whiten"`` subtracts E[x] and multiplies by
        (Cov[x] + eps I)^(-1/2), as :func:`bnlib.whitening.whitening_matrix` computes it.
    eps
        Added to variances, in squared units of ``x``.

    Returns
    -------
    Tensor
        ``(m, d)``; in the units of ``x`` when it is only centered, else without units.

    Raises
    ------
    TypeError
        If an argument is not a floating-point tensor.
    ValueError
        For an unknown kind, a negative ``eps``, shapes that do not fit, fewer than two examples,
        or, when whitening, a covariance that is singular to working precision.
    """
    _check(x, examples, kind, eps)
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
    """Backpropagate through each argument of Norm(x, 𝒳) alone, at 𝒳 = x.

    Parameters
    ----------
    x
        ``(m, d)``, the mini-batch that is normalized with its own statistics.
    grad
        ``(m, d)``, the derivative of the loss with respect to ``norm(x, x)``.
    kind, eps
        As in :func:`norm`.

    Raises
    ------
    TypeError, ValueError
        As :func:`norm`; and if ``grad`` has not the shape of ``x``.
    """
    if grad.shape != x.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}, but x has {tuple(x.shape)}")
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
    replicas
        ``S`` networks side by side, as in :mod:`bnlib.mnist.stacks`: the activations are
        ``(m, S * d)``, and each group of d is whitened for itself. A group that is no longer finite
        stays so.

    Raises
    ------
    ValueError
        For an unknown kind, a negative ``eps``, ``refresh`` or ``replicas`` below 1.
    """

    def __init__(
        self,
        kind: Kind = "scale",
        *,
        live: bool = False,
        refresh: int | None = 1,
        replicas: int = 1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_options(kind, eps)
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh must be at least 1, or None for never; got {refresh}")
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        self.kind, self.live, self.refresh = kind, live, refresh
        self.replicas, self.eps = replicas, eps
        self._examples: Tensor | None = None
        self._passes = 0

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"{self.kind!r}, live={self.live}, refresh={self.refresh}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a mini-batch.

        Parameters
        ----------
        x
            ``(m, S * d)``.

        Raises
        ------
        TypeError, ValueError
            As :func:`norm`; and if the columns do not divide into the replicas.
        """
        examples = x if self.live else self._detached(x)
        if self.kind != "whiten" or self.replicas == 1:
            return norm(x, examples, self.kind, self.eps)
        if x.shape[-1] % self.replicas:
            raise ValueError(f"x of shape {tuple(x.shape)} is not {self.replicas} equal groups")
        groups = zip(x.chunk(self.replicas, 1), examples.chunk(self.replicas, 1), strict=True)
        return torch.cat(
            [norm(g, e, self.kind, self.eps) if _finite(g, e) else g * math.nan for g, e in groups],
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
    """Within the block, every :class:`Norm` of the model keeps ∂Norm/∂𝒳.

    Parameters
    ----------
    model
        Any module; it is as before when the block ends, however it ends.

    Raises
    ------
    ValueError
        If the model has no such layer.
    """
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


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _check_options(kind: str, eps: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    check_ridge(eps)


def _check(x: Tensor, examples: Tensor, kind: str, eps: float) -> None:
    _check_options(kind, eps)
    check_input(x)
    check_input(examples, "examples")
    if x.ndim != 2 or examples.ndim != 2 or x.shape[1] != examples.shape[1]:
        raise ValueError(
            "x must be (m, d) and examples (n, d), with the same d; got shapes "
            f"{tuple(x.shape)} and {tuple(examples.shape)}"
        )
    if len(examples) < 2:
        raise ValueError("statistics take at least two examples; got one")
