"""Functions of a sample against scipy, numpy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnlib.observe import distributions as D


def skewed(n: int = 501, units: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, units, generator=generator, dtype=torch.float64)
    return (normal * torch.tensor([0.3, 1.0, 0.7])).exp() + torch.tensor([0.0, -3.0, 100.0])


def test_percentiles_are_those_of_numpy() -> None:
    x = skewed()
    ranks = (0, 2.5, 15, 50, 85, 100)
    got = D.percentiles(x, ranks, dim=0)
    np.testing.assert_allclose(got, np.percentile(x.numpy(), ranks, axis=0), rtol=1e-12)
    np.testing.assert_allclose(D.percentiles(x, ranks), np.percentile(x.numpy(), ranks), rtol=1e-12)
    np.testing.assert_allclose(
        D.percentiles(x.T, ranks, dim=1), np.percentile(x.numpy(), ranks, axis=0), rtol=1e-12
    )


def test_percentiles_take_samples_that_torch_quantile_refuses() -> None:
    x = torch.arange(2**24 + 2, dtype=torch.float32)
    assert D.percentiles(x, [50]).item() == pytest.approx(2**23 + 0.5, abs=1)


def test_percentiles_pass_on_nan_and_survive_infinity() -> None:
    x = torch.tensor([[1.0, 1.0], [2.0, torch.nan], [torch.inf, 3.0]])
    got = D.percentiles(x, [0, 50], dim=0)
    assert got[:, 0].tolist() == [1.0, 2.0]
    assert got[:, 1].isnan().all()


def test_moments_are_those_of_scipy() -> None:
    x = skewed()
    got = D.moments(x, dim=0)
    np.testing.assert_allclose(got.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.std, x.numpy().std(0), rtol=1e-12)
    np.testing.assert_allclose(got.skewness, scipy.stats.skew(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(got.excess_kurtosis, scipy.stats.kurtosis(x.numpy()), rtol=1e-9)


def test_a_constant_sample_has_a_deviation_of_zero_and_no_shape() -> None:
    got = D.moments(torch.full((1000,), 0.1))
    assert got.std.item() < 1e-7
    assert got.skewness.isnan()
    for measure in D.gaussianity(torch.full((9,), 3.0)):
        assert measure.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (skewed() * 3).to(dtype)
    for name in ("mean", "std"):
        got = getattr(D.moments(x, dim=0), name)
        assert got.dtype == torch.float32
        want = getattr(D.moments(x.double(), dim=0), name)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=1, max_size=30))
@settings(deadline=None)
def test_wasserstein_is_that_of_scipy_for_any_two_samples(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    want = scipy.stats.wasserstein_distance(a, b)
    assert D.wasserstein(x, y).item() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_wasserstein_of_a_shifted_sample_is_the_shift_unit_by_unit() -> None:
    x = skewed()
    shift = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(D.wasserstein(x, x + shift, dim=0), shift.abs())
    torch.testing.assert_close(D.wasserstein(x.T, (x + shift).T, dim=1), shift.abs())


def test_ks_distance_is_that_of_scipy() -> None:
    x = skewed()
    got = D.gaussianity(x, dim=0).ks_distance
    for unit in range(3):
        column = x[:, unit].numpy()
        want = scipy.stats.kstest(column, "norm", args=(column.mean(), column.std())).statistic
        assert got[unit].item() == pytest.approx(want, rel=1e-9)


def true_negentropy(pdf: object, mean: float, std: float) -> float:
    def integrand(y: float) -> float:
        p = pdf(y)  # type: ignore[operator]
        return p * np.log(p) if p > 0 else 0.0

    entropy = -scipy.integrate.quad(integrand, mean - 12 * std, mean + 12 * std, limit=400)[0]
    return 0.5 * np.log(2 * np.pi * np.e * std**2) - entropy


@pytest.mark.parametrize("spread", [0.6, 0.9, 1.2])
def test_negentropy_is_near_the_integral_for_distributions_near_the_gaussian(
    spread: float,
) -> None:
    # Two Gaussians of width 1, unequal weights: smooth, with a known density.
    def pdf(y: float) -> float:
        return 0.7 * scipy.stats.norm.pdf(y, -0.3 * spread * 2) + 0.3 * scipy.stats.norm.pdf(
            y, 0.7 * spread * 2
        )

    std = float(np.sqrt(1 + 0.21 * (2 * spread) ** 2))
    rng = np.random.default_rng(0)
    high = rng.random(200_000) < 0.3
    x = rng.standard_normal(high.size) + np.where(high, 1.4 * spread, -0.6 * spread)
    want = true_negentropy(pdf, 0.0, std)
    assert D.gaussianity(torch.from_numpy(x)).negentropy.item() == pytest.approx(want, rel=0.35)


def test_gaussian_samples_score_what_the_docstrings_say_and_a_uniform_one_scores_more() -> None:
    generator = torch.Generator().manual_seed(1)
    n, units = 2000, 400
    normal = D.gaussianity(torch.randn(n, units, generator=generator), dim=0)
    assert normal.skewness.abs().mean() < 0.06
    assert normal.negentropy.mean().item() == pytest.approx(1.1 / n, rel=0.2)
    assert normal.ks_distance.mean().item() == pytest.approx(0.6 / n**0.5, rel=0.1)
    uniform = D.gaussianity(torch.rand(n, units, generator=generator), dim=0)
    assert uniform.excess_kurtosis.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert uniform.negentropy.min() > normal.negentropy.max()
    assert uniform.ks_distance.min() > normal.ks_distance.max()


@given(st.floats(-12, 12))
@settings(deadline=None)
def test_saturation_is_a_slope_below_a_tenth_of_the_largest(z: float) -> None:
    sigmoid = 1 / (1 + np.exp(-z))
    derivative = sigmoid * (1 - sigmoid)
    if abs(derivative / 0.25 - 0.1) > 1e-9:
        got = D.saturated_fraction(torch.tensor([z], dtype=torch.float64))
        assert got.item() == float(derivative < 0.1 * 0.25)


def test_saturation_counts_unit_by_unit() -> None:
    z = torch.tensor([[0.0, 9.0], [-3.7, 9.0], [3.5, 0.0], [0.0, 9.0]])
    assert D.saturated_fraction(z, dim=0).tolist() == [0.25, 0.75]
    assert D.saturated_fraction(z).item() == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: D.percentiles(x, [101]), r"\[0, 100\].*101"),
        (lambda x: D.percentiles(x, []), r"at least one"),
        (lambda x: D.moments(x[:0], dim=0), r"no sample"),
        (lambda x: D.wasserstein(x, x[:, :2], dim=0), r"\(4, 3\) and \(4, 2\)"),
    ],
)
def test_bad_input_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 3))  # type: ignore[operator]


def test_what_is_no_real_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="list"):
        D.moments([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="complex64"):
        D.moments(torch.zeros(3, dtype=torch.complex64))
