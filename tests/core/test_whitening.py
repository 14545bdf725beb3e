"""Whitening: against other libraries, against finite differences, and where it must refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from bnlib import batch_norm
from bnlib.whitening import METHODS, Method, Whitening, whiten, whitening_matrix

every_method = pytest.mark.parametrize("method", METHODS)
smooth_method = pytest.mark.parametrize("method", ["zca", "cholesky"])


def batch(m: int, d: int, seed: int = 0, **options: Any) -> Tensor:
    """Correlated features with different variances and means."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(m, d, generator=generator, dtype=torch.float64) @ mixing
    return (x + 3 * torch.randn(d, generator=generator, dtype=torch.float64)).to(**options)


def isotropic(m_over_d: int, d: int, seed: int = 0) -> Tensor:
    """A batch whose covariance is the identity: every eigenvalue repeated."""
    x = batch(m_over_d * d, d, seed)
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * len(x) ** 0.5


def covariance(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    return centered.mT @ centered / len(x)


def upstream(x: Tensor, seed: int = 99) -> Tensor:
    """A random gradient: a uniform one is annihilated by the centering."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


@every_method
@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 30), d=st.integers(1, 12), eps=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_each_variance_becomes_the_fraction_that_eps_leaves_of_one(
    method: Method, m: int, d: int, eps: float
) -> None:
    x = batch(m, d, seed=m * 31 + d)
    before = torch.linalg.eigvalsh(covariance(x)).clamp(min=0)
    y = whiten(x, eps, method)
    torch.testing.assert_close(y.mean(0), torch.zeros(d).double(), rtol=0, atol=1e-9)
    after = torch.linalg.eigvalsh(covariance(y))
    torch.testing.assert_close(after, before / (before + eps), rtol=0, atol=1e-9)


@every_method
def test_without_eps_the_covariance_is_the_identity(method: Method) -> None:
    y = whiten(batch(50, 8), 0, method)
    torch.testing.assert_close(covariance(y), torch.eye(8).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0, 0.1])
def test_zca_is_the_inverse_square_root_that_scipy_computes(eps: float) -> None:
    x = batch(40, 6)
    expected = np.linalg.inv(scipy.linalg.sqrtm(covariance(x).numpy() + eps * np.eye(6)))
    mean, matrix = whitening_matrix(x, eps, "zca")
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mean, x.mean(0))


def test_pca_gives_the_singular_vectors_largest_first_with_the_stated_sign() -> None:
    x = batch(40, 6)
    left, _, right = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    sign = np.sign(right[np.arange(6), np.abs(right).argmax(1)])
    expected = left * sign * len(x) ** 0.5
    np.testing.assert_allclose(whiten(x, 0, "pca").numpy(), expected, rtol=1e-8, atol=1e-9)
    assert (whitening_matrix(x, 0, "pca").matrix @ torch.from_numpy(right.T * sign)).trace() > 0


def test_cholesky_is_the_gram_schmidt_process() -> None:
    x = batch(40, 6)
    q, r = np.linalg.qr((x - x.mean(0)).numpy())
    expected = q * np.sign(np.diag(r)) * len(x) ** 0.5
    np.testing.assert_allclose(whiten(x, 0, "cholesky").numpy(), expected, rtol=1e-9, atol=1e-10)


def test_of_all_whitenings_zca_changes_the_batch_least() -> None:
    x = batch(40, 6)
    centered, zca = x - x.mean(0), whiten(x, 0)
    least = (zca - centered).square().sum()
    for seed in range(20):
        rotation, _ = torch.linalg.qr(batch(6, 6, seed))
        assert (zca @ rotation - centered).square().sum() > least
    for method in ("pca", "cholesky"):
        assert (whiten(x, 0, method) - centered).square().sum() > least


@every_method
def test_one_feature_is_batch_normalized(method: Method) -> None:
    x = batch(20, 1)
    torch.testing.assert_close(whiten(x, 1e-3, method), batch_norm(x, eps=1e-3))


@every_method
def test_the_matrix_and_mean_whiten_the_batch_and_can_be_kept_for_others(method: Method) -> None:
    x = batch(40, 6)
    kept = whitening_matrix(x, 1e-3, method)
    assert isinstance(kept, Whitening)
    torch.testing.assert_close((x - kept.mean) @ kept.matrix.mT, whiten(x, 1e-3, method))


def test_zca_follows_a_reordering_of_the_features_and_cholesky_does_not() -> None:
    x, order = batch(40, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(whiten(x[:, order]), whiten(x)[:, order])
    different = whiten(x[:, order], method="cholesky") - whiten(x, method="cholesky")[:, order]
    assert different.abs().max() > 0.1


# The derivative


@every_method
@pytest.mark.parametrize("eps", [0, 0.05])
@pytest.mark.parametrize(("m", "d"), [(12, 5), (7, 1), (4, 3)])
def test_the_gradient_is_that_of_finite_differences(
    method: Method, eps: float, m: int, d: int
) -> None:
    x = batch(m, d).requires_grad_()
    assert gradcheck(lambda x: whiten(x, eps, method), x)
    assert gradcheck(lambda x: tuple(whitening_matrix(x, eps, method)), x)


@every_method
def test_the_second_derivative_is_that_of_finite_differences(method: Method) -> None:
    assert gradgradcheck(lambda x: whiten(x, 0.05, method), batch(9, 3).requires_grad_())


@smooth_method
def test_the_gradient_is_right_where_every_eigenvalue_is_the_same(method: Method) -> None:
    x = isotropic(4, 3)
    torch.testing.assert_close(covariance(x), torch.eye(3).double(), rtol=0, atol=1e-12)
    x.requires_grad_()
    assert gradcheck(lambda x: whiten(x, 0, method), x)
    assert gradgradcheck(lambda x: whiten(x, 0, method), x)


@smooth_method
def test_the_gradient_is_right_where_the_covariance_is_singular(method: Method) -> None:
    assert gradcheck(lambda x: whiten(x, 0.1, method), batch(4, 6).requires_grad_())


def test_the_closed_form_agrees_with_autograd_through_distinct_eigenvalues() -> None:
    x = batch(30, 6).requires_grad_()
    values, vectors = torch.linalg.eigh(covariance(x))
    reference = (x - x.mean(0)) @ (vectors / values.sqrt() @ vectors.mT)
    expected = torch.autograd.grad(reference, x, upstream(x))
    torch.testing.assert_close(torch.autograd.grad(whiten(x, 0), x, upstream(x)), expected)


@pytest.mark.parametrize("x", [isotropic(4, 3), batch(4, 6)], ids=["isotropic", "m < d"])
def test_pca_refuses_the_gradient_at_repeated_eigenvalues_and_names_the_gap(x: Tensor) -> None:
    y = whiten(x.requires_grad_(), 0.1, "pca")
    assert y.isfinite().all(), "the value itself exists"
    with pytest.raises(RuntimeError, match=r"eigenvalues .* apart.*'zca' or 'cholesky'"):
        y.backward(upstream(x))
    assert x.grad is None


@every_method
def test_the_jacobian_loses_the_mean_and_the_covariance_and_nothing_else(method: Method) -> None:
    m, d = 9, 3
    full = torch.autograd.functional.jacobian(lambda x: whiten(x, 0, method), batch(m, d))
    assert isinstance(full, Tensor)
    rank = torch.linalg.matrix_rank(full.reshape(m * d, m * d), rtol=1e-8)
    assert rank == m * d - d - d * (d + 1) // 2


def test_a_detached_matrix_leaves_the_derivative_of_the_statistics_out() -> None:
    x = batch(30, 4).requires_grad_()
    fixed = whitening_matrix(x.detach())
    assert not fixed.mean.requires_grad
    assert not fixed.matrix.requires_grad
    (grad,) = torch.autograd.grad((x - fixed.mean) @ fixed.matrix.mT, x, upstream(x))
    torch.testing.assert_close(grad, upstream(x) @ fixed.matrix)
    (true,) = torch.autograd.grad(whiten(x), x, upstream(x))
    assert (grad - true).norm() > 0.1 * true.norm()


# Few examples


@every_method
@pytest.mark.parametrize("m", [2, 5, 6])
def test_without_eps_fewer_examples_than_dimensions_are_refused(method: Method, m: int) -> None:
    with pytest.raises(ValueError, match=rf"m={m} .* d=6 .* m - 1 = {m - 1} .*eps > 0"):
        whiten(batch(m, 6), 0, method)
    assert whiten(batch(7, 6), 0, method).isfinite().all()


@every_method
def test_a_batch_no_larger_than_its_dimension_loses_all_its_distances(method: Method) -> None:
    distances = torch.pdist(whiten(batch(8, 20), 1e-10, method))
    torch.testing.assert_close(distances, torch.full_like(distances, 16**0.5))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [3, 40, 160])
def test_a_feature_that_follows_from_others_is_refused_without_eps(
    method: Method, dtype: torch.dtype, d: int
) -> None:
    x = batch(4 * d, d, dtype=dtype)
    x[:, -1] = x[:, :-1].mean(1)
    with pytest.raises(ValueError, match=r"eps=0 .*singular to working precision.*Give eps above"):
        whiten(x, 0, method)


@every_method
def test_the_eps_that_a_refusal_asks_for_is_enough(method: Method) -> None:
    x = 300 * batch(10, 30, dtype=torch.float32)
    with pytest.raises(ValueError, match="compute in float64") as refusal:
        whiten(x, 1e-5, method)
    asked = float(str(refusal.value).split("eps above ")[1].split(",")[0])
    assert whiten(x, 1.1 * asked, method).isfinite().all()
    assert whiten(x.double(), 1e-5, method).isfinite().all()


@every_method
def test_a_constant_feature_comes_out_as_zero(method: Method) -> None:
    x = batch(30, 4)
    x[:, 2] = 5
    y = whiten(x, 1e-3, method)
    # PCA moves the feature to the last place, that of the smallest variance.
    torch.testing.assert_close(y[:, 3 if method == "pca" else 2], torch.zeros(30).double())
    with pytest.raises(ValueError, match="constant"):
        whiten(x, 0, method)


# Types, layouts, sizes


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(
    method: Method, dtype: torch.dtype
) -> None:
    x = batch(60, 4, dtype=dtype).requires_grad_()
    y = whiten(x, 1e-2, method)
    assert y.dtype == dtype
    assert whitening_matrix(x, 1e-2, method).matrix.dtype == torch.float32
    torch.testing.assert_close(y, whiten(x.float(), 1e-2, method).to(dtype))
    y.backward(upstream(x))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


@every_method
def test_autocast_does_not_lower_the_precision(method: Method) -> None:
    x = batch(60, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = whiten(x, method=method)
    torch.testing.assert_close(y, whiten(x, method=method))
    assert y.dtype == torch.float32


@every_method
def test_a_huge_mean_costs_no_digits(method: Method) -> None:
    x = batch(60, 4, dtype=torch.float32).mul(64).round().div(64)  # exact under the shift
    shifted, expected = whiten(x + 1e5, 1e-3, method), whiten(x, 1e-3, method)
    torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)


@every_method
def test_layout_in_memory_does_not_matter(method: Method) -> None:
    x = batch(40, 6)
    torch.testing.assert_close(whiten(x.T.contiguous().T, method=method), whiten(x, method=method))
    torch.testing.assert_close(whiten(x[::2], method=method), whiten(x[::2].clone(), method=method))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.randn(8, 2), {"method": "svd"}, ValueError, r"zca, pca, cholesky; got 'svd'"),
        (
            torch.randn(8, 2),
            {"eps": -1e-3},
            ValueError,
            r"eps is -0.001; it must be zero or a positive",
        ),
        (torch.randn(8, 2), {"eps": float("nan")}, ValueError, r"eps is nan"),
        (torch.randn(8, 2, 3, 3), {}, ValueError, r"\(8, 2, 3, 3\).*movedim"),
        (torch.randn(8, 0), {}, ValueError, r"d > 0 .*\(8, 0\)"),
        (torch.randn(1, 2), {}, ValueError, r"at least two examples.*\(1, 2\)"),
        (torch.randn(0, 2), {}, ValueError, r"at least two examples.*\(0, 2\)"),
        (torch.full((8, 2), torch.nan), {}, ValueError, "NaN or infinity"),
        (torch.arange(8).view(4, 2), {}, TypeError, "int64"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    x: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for transform in (whiten, whitening_matrix):
        with pytest.raises(error, match=message):
            transform(x, **options)
