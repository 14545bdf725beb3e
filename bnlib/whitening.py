"""Full whitening, the transform of sections 2 and 3 that batch normalization stands in for.

A mini-batch of vectors is centered and multiplied by a matrix W with W Cov[x] Wᵀ = I. The paper
writes W = Cov[x]^(-1/2). An orthogonal matrix times W whitens as well; three choices are here.

The derivative passes through the covariance too, as section 2 demands: ∂Norm/∂x and ∂Norm/∂𝒳. To
leave the second out, compute :func:`whitening_matrix` of ``x.detach()``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bnlib._core.channels import check_eps, check_input
from bnlib._core.formulas import center

__all__ = ["METHODS", "Whitening", "whiten", "whitening_matrix"]

Method = Literal["zca", "pca", "cholesky"]
#: The whitening matrices that :func:`whitening_matrix` can compute.
METHODS: tuple[Method, ...] = get_args(Method)

# Rounding moves the eigenvalues of a covariance by up to about twice the machine epsilon times the
# largest of them, whatever d is (measured, d = 4 to 512). What is below five times that is noise.
_NOISE = 10


class Whitening(NamedTuple):
    """What whitens a batch: ``(x - mean) @ matrix.T``; see :func:`whitening_matrix`."""

    mean: Tensor  #: (d,), the paper's E[x] over the mini-batch
    matrix: Tensor  #: (d, d), with ``matrix @ (Cov[x] + eps * I) @ matrix.T`` the identity


def whiten(x: Tensor, eps: float = 1e-5, method: Method = "zca") -> Tensor:
    """Center and decorrelate a mini-batch, and scale it to unit variance in every direction.

    The result has zero mean and the covariance ``W Cov[x] Wᵀ``: along an eigenvector of ``Cov[x]``
    with eigenvalue λ, it has variance λ / (λ + eps) instead of λ. Derivatives with respect to ``x``
    take in those of the mean and of W.

    Parameters
    ----------
    x
        ``(m, d)``: m examples of d features, in float16, bfloat16, float32 or float64. The
        half-precision types are computed in float32.
    eps
        Added to every eigenvalue of the covariance, in squared units of ``x``. The paper's ε, which
        it adds to the variances of batch normalization; its formula for whitening has none. With
        ``eps=0`` the covariance must be invertible, which takes m > d.
    method
        Which of the matrices of :func:`whitening_matrix`: ``"zca"``, ``"pca"`` or ``"cholesky"``.

    Returns
    -------
    Tensor
        ``(m, d)``, in the type of ``x``, without units.

    Raises
    ------
    TypeError, ValueError
        As :func:`whitening_matrix`.
    RuntimeError
        From ``backward``, for ``method="pca"``, when two eigenvalues coincide.
    """
    centered, whitening = _whitening(x, eps, method)
    with torch.autocast(x.device.type, enabled=False):
        return (centered @ whitening.matrix.mT).to(x.dtype)


def whitening_matrix(x: Tensor, eps: float = 1e-5, method: Method = "zca") -> Whitening:
    """The mean of a mini-batch and a matrix that whitens it, both differentiable in ``x``.

    With Σ = Cov[x] + eps I, U its eigenvectors as columns and Λ its eigenvalues:

    ``"zca"``
        W = Σ^(-1/2) = U Λ^(-1/2) Uᵀ, the paper's. Symmetric; of all whitening matrices the one that
        changes the batch least. Smooth wherever Σ is invertible, at repeated eigenvalues too.
    ``"pca"``
        W = Λ^(-1/2) Uᵀ: the principal components, largest variance first, each of unit variance.
        An eigenvector's sign is free; here its component of largest magnitude is positive. The
        derivative does not exist where two eigenvalues coincide, and is refused there.
    ``"cholesky"``
        W = L^(-1), where Σ = L Lᵀ and L is lower triangular with a positive diagonal: feature k is
        rid of what features 1 to k-1 predict of it (Gram-Schmidt). Smooth wherever Σ is invertible;
        depends on the order of the features.

    The covariance is the paper's, E[x xᵀ] - E[x] E[x]ᵀ with division by m, computed from centered
    values. Price: O(m d² + d³) operations, against O(m d) for batch normalization.

    Parameters
    ----------
    x, eps, method
        As in :func:`whiten`.

    Returns
    -------
    Whitening
        Mean ``(d,)`` and matrix ``(d, d)``, in float32 or wider.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor.
    ValueError
        If ``x`` is not ``(m, d)`` with m > 1, holds NaN or infinity, ``eps`` is negative, the
        method is unknown, or Cov[x] + eps I is singular to working precision.
    """
    return _whitening(x, eps, method)[1]


def _whitening(x: Tensor, eps: float, method: str) -> tuple[Tensor, Whitening]:
    """The centered batch, which keeps digits that ``x - mean`` loses, and what whitens it."""
    _check(x, eps, method)
    centered, mean = center(x)
    m, d = x.shape
    with torch.autocast(x.device.type, enabled=False):
        covariance = centered.mT @ centered / m
        covariance = covariance + eps * torch.eye(d, dtype=covariance.dtype, device=x.device)
        if method == "zca":
            matrix = _InverseSquareRoot.apply(covariance, m, eps)
        elif method == "pca":
            matrix = _principal_axes(covariance, m, eps)
        else:
            matrix = _inverse_cholesky(covariance, m, eps)
    return centered, Whitening(mean, matrix)


class _InverseSquareRoot(torch.autograd.Function):
    """W = Σ^(-1/2), with a derivative that repeated eigenvalues do not disturb.

    With S = Σ^(1/2), differentiating W Σ W = I gives S dW + dW S = -W dΣ W. In the eigenvectors of
    Σ this is dW_ij = -dΣ_ij / (s_i s_j (s_i + s_j)), with s² the eigenvalues: the divided
    difference of λ^(-1/2) (Daleckii and Krein) with its (λ_i - λ_j) canceled by hand.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, m: int, eps: float) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        _refuse_singular(values[0] / values[-1], values[-1], m, eps)
        roots = values.sqrt()
        matrix = vectors / roots @ vectors.mT
        ctx.save_for_backward(covariance, matrix, vectors, roots)
        return matrix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        covariance, matrix, vectors, roots = ctx.saved_tensors
        (grad,) = grads
        symmetric = (grad + grad.mT) / 2
        solved = _Sylvester.apply(symmetric, covariance @ matrix, vectors, roots)
        return -matrix @ solved @ matrix, None, None


class _Sylvester(torch.autograd.Function):
    """The X with S X + X S = C, for S = U diag(s) Uᵀ with s > 0: what the derivative above solves.

    S itself enters only the derivative's graph, so that second derivatives come out right.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, s: Tensor, vectors: Tensor, roots: Tensor) -> Tensor:
        inner = vectors.mT @ c @ vectors / (roots[:, None] + roots)
        x = vectors @ inner @ vectors.mT
        ctx.save_for_backward(x, s, vectors, roots)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, s, vectors, roots = ctx.saved_tensors
        y = _Sylvester.apply(grads[0], s, vectors, roots)
        return y, -(y @ x.mT + x.mT @ y), None, None


def _principal_axes(covariance: Tensor, m: int, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    known = values.detach()
    _refuse_singular(known[0] / known[-1], known[-1], m, eps)
    if vectors.requires_grad:
        vectors.register_hook(lambda grad: _refuse_repeated(known))
    largest = vectors.detach().abs().argmax(0, keepdim=True)
    signs = vectors.detach().gather(0, largest).sign()
    return (vectors * signs / values.sqrt()).flip(1).mT


def _inverse_cholesky(covariance: Tensor, m: int, eps: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = covariance.detach().diagonal()
    # What the features before it leave unexplained of a feature's variance, as a fraction.
    left = (factor.detach().diagonal().square() / diagonal).min()
    _refuse_singular(torch.zeros_like(left) if failed else left, diagonal.max(), m, eps)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _check(x: Tensor, eps: float, method: str) -> None:
    check_input(x)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_eps(eps, zero=True)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(
            f"x must be (m, d), m examples of d > 0 features; got shape {tuple(x.shape)}. Pixels "
            "of feature maps (N, C, H, W) become examples by x.movedim(1, -1).flatten(0, -2)"
        )
    if len(x) < 2:
        raise ValueError(f"whitening takes at least two examples; x has shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinity, so it has no covariance")
    m, d = x.shape
    if eps == 0 and m <= d:
        raise ValueError(
            f"eps=0 with m={m} examples of d={d} features: they span at most m - 1 = {m - 1} "
            f"dimensions, so their covariance is singular. Give eps > 0, or more than {d} examples"
        )


def _refuse_singular(ratio: Tensor, largest: Tensor, m: int, eps: float) -> None:
    """Refuse when `ratio`, which is 0 for a singular covariance, cannot be told from 0."""
    noise = _NOISE * torch.finfo(ratio.dtype).eps
    if not ratio > noise:
        wider = "" if ratio.dtype == torch.float64 else "compute in float64, "
        raise ValueError(
            f"the covariance of m={m} examples, with eps={eps:g} on its diagonal, is singular to "
            f"working precision: its smallest eigenvalue or pivot is {ratio.item():.1e} of the "
            f"largest ({largest.item():.2g}), where rounding alone can make {noise:.0e}. Give eps "
            f"above {2 * noise * largest.item():.1e}, {wider}or leave out features that are "
            "constant or follow from others"
        )


def _refuse_repeated(values: Tensor) -> None:
    gaps = values.diff()
    noise = _NOISE * torch.finfo(values.dtype).eps * values[-1]
    if len(gaps) and not gaps.min() > noise:
        at = int(gaps.argmin())
        raise RuntimeError(
            "whitening by method='pca' has no derivative here: the covariance's eigenvalues "
            f"{values[at].item():.6g} and {values[at + 1].item():.6g} are {gaps[at].item():.1e} "
            f"apart, no more than rounding makes ({noise.item():.1e}), so their eigenvectors are "
            "arbitrary. Use method='zca' or 'cholesky', which are smooth there"
        )
