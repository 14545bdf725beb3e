"""Algorithm 1 against torch's own layer, and the identities the paper derives from it."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlib._core import autograd, kernels
from bnlib.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_steps,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_with_statistics,
)

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(
    lambda shape: torch.Size(shape).numel() > shape[1]
)
layouts = st.sampled_from(["contiguous", "channels_last", "strided", "expanded", "transposed"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def lay_out(x, layout):
    """The values of ``x`` (up to repetition) under other strides."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded":
        return torch.cat([x[:1], x[:1] + 1])[:, None].expand(2, 3, *x.shape[1:]).flatten(0, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@contextlib.contextmanager
def computed_by_kernels(block):
    """Small tensors too, in one block, several, or one for each row; or by the formulas (None)."""
    if block is None:
        yield
        return
    with mock.patch.object(autograd, "SMALL", 0), mock.patch.object(kernels, "_BLOCK", block):
        yield


def reference(x, gamma, beta, eps):
    """torch's own layer, in float64."""
    tensors = [t.detach().double().requires_grad_() for t in (x, gamma, beta)]
    y = torch.nn.functional.batch_norm(
        tensors[0].contiguous(), None, None, *tensors[1:], training=True, eps=eps
    )
    return y, tensors


def make(shape, dtype=torch.float64, seed=0, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset
    gamma = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    beta = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    grad_y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, gamma, beta, grad_y))


@settings(max_examples=200, deadline=None)
@given(
    shapes,
    layouts,
    dtypes,
    st.integers(0, 2**16),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, 20.0]),
    st.booleans(),
    st.sampled_from([None, 1, 16, 2**18]),
)
def test_values_and_gradients_are_those_of_torch_in_float64(
    shape, layout, dtype, seed, scale, offset, wide_parameters, block
):
    x, gamma, beta, _ = make(shape, dtype, seed, scale, offset * scale)
    x = lay_out(x, layout).requires_grad_()
    if wide_parameters and dtype in (torch.float16, torch.bfloat16):
        gamma, beta = gamma.float(), beta.float()
    gamma.requires_grad_()
    beta.requires_grad_()
    eps = 1e-5 * scale**2
    with computed_by_kernels(block):
        y = batch_norm(x, gamma, beta, eps)
        grad_y = lay_out(torch.randn(y.shape, dtype=torch.float64), layout)[: len(y)].to(dtype)
        grads = torch.autograd.grad(y, (x, gamma, beta), grad_y)

    want, tensors = reference(x, gamma, beta, eps)
    # contiguous, because torch's CPU kernel errs for some strides of grad_y where axes have size 1
    wanted = torch.autograd.grad(want, tensors, grad_y.double().contiguous())
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    tolerance = TOLERANCE[dtype]
    # rounding x costs |x| / std in x_hat, whoever computes it
    inv_std = (tensors[0].detach().transpose(0, 1).flatten(1).var(1, correction=0) + eps).rsqrt()
    condition = max(1.0, float(inv_std.max() * x.detach().abs().max()))
    largest = 1 + float(gamma.detach().abs().max() + beta.detach().abs().max())
    tolerance = TOLERANCE[dtype] * condition * largest
    torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=tolerance)
    values = 1 + float(grad_y.abs().max()) * (x.numel() // x.shape[1])
    for got, expected, tensor in zip(grads, wanted, (x, gamma, beta), strict=True):
        assert got.dtype == tensor.dtype
        limit = tolerance * values * (float(inv_std.max()) if tensor is x else 1.0)
        torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=limit)


@pytest.mark.parametrize("shape", [(7, 4), (5, 3, 6), (4, 3, 5, 2), (3, 2, 2, 4, 3)])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_the_six_lines_and_the_compact_form_are_what_autograd_computes(shape, with_gamma):
    x, gamma, beta, grad_y = make(shape)
    gamma = gamma.requires_grad_() if with_gamma else None
    x.requires_grad_()
    beta.requires_grad_()
    forward = batch_norm_forward(x, gamma, beta)  # plain operations: autograd's own derivative
    inputs = (x, gamma, beta) if with_gamma else (x, beta)
    wanted = torch.autograd.grad(forward.y, inputs, grad_y)

    compact = batch_norm_backward(grad_y, forward.x_hat, forward.inv_std, gamma)
    steps = batch_norm_backward_steps(grad_y, x, gamma)
    fast = torch.autograd.grad(batch_norm(x, gamma, beta), inputs, grad_y)
    for form in (compact, steps):
        got = (form.x, form.gamma, form.beta) if with_gamma else (form.x, form.beta)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(fast, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_first_three_of_the_six_lines_are_autograds_gradients_of_the_intermediates():
    x, gamma, beta, grad_y = make((6, 3, 4))
    # Algorithm 1 with every intermediate a leaf of its own line
    mean = x.mean((0, 2), keepdim=True).requires_grad_()
    var = (x - mean).square().mean((0, 2), keepdim=True).detach().requires_grad_()
    x_hat = (x - mean) / torch.sqrt(var + 1e-5)
    y = x_hat * gamma[:, None] + beta[:, None]
    grad_x_hat, grad_var = torch.autograd.grad(y, (x_hat, var), grad_y, retain_graph=True)
    direct = torch.autograd.grad(y, mean, grad_y)[0]
    through_var = grad_var * (-2 * (x - mean)).mean((0, 2), keepdim=True)

    steps = batch_norm_backward_steps(grad_y, x, gamma)
    torch.testing.assert_close(steps.x_hat, grad_x_hat)
    torch.testing.assert_close(steps.var, grad_var.flatten())
    torch.testing.assert_close(steps.mean, (direct + through_var).flatten())


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**16), st.floats(1e-8, 1e2))
def test_x_hat_has_mean_zero_and_second_moment_var_over_var_plus_eps(shape, seed, eps):
    x, gamma, beta, _ = make(shape, seed=seed)
    result = batch_norm_forward(x, gamma, beta, eps)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    zero = torch.zeros_like(result.mean)
    torch.testing.assert_close(result.x_hat.mean(axes), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.x_hat.square().mean(axes), result.var / (result.var + eps))
    torch.testing.assert_close(result.inv_std, (result.var + eps) ** -0.5)
    torch.testing.assert_close(batch_norm(x, gamma, beta, eps), result.y)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_the_gradient_sums_to_zero_and_is_orthogonal_to_x_hat_without_eps(shape, seed):
    x, gamma, beta, grad_y = make(shape, seed=seed)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    along = {}
    for eps in (1e-2, 1e-13):
        forward = batch_norm_forward(x, gamma, beta, eps)
        grad_x = batch_norm_backward(grad_y, forward.x_hat, forward.inv_std, gamma).x
        size = grad_y.norm() * forward.inv_std.max() * gamma.abs().max()
        assert (grad_x.sum(axes).abs() <= 1e-11 * size).all()
        along[eps] = (grad_x * forward.x_hat).sum(axes).abs() / size
        # exactly: sum x_hat dl/dx = gamma s (eps / (var + eps)) sum g x_hat
        exact = gamma * forward.inv_std * eps * forward.inv_std**2
        products = (grad_y * forward.x_hat).sum(axes)
        torch.testing.assert_close((grad_x * forward.x_hat).sum(axes), exact * products)
    well_conditioned = batch_norm_forward(x).var > 1e-3
    assert (along[1e-13][well_conditioned] < 1e-8).all()


def test_gamma_sqrt_of_var_plus_eps_and_beta_mean_give_the_identity():
    x, *_ = make((8, 5, 3, 3), offset=4.0)
    result = batch_norm_forward(x)
    gamma, beta = 1 / result.inv_std, result.mean
    torch.testing.assert_close(batch_norm(x, gamma, beta), x)
    torch.testing.assert_close(batch_norm_inference(x, result.mean, result.var, gamma, beta), x)


@pytest.mark.parametrize("a", [0.01, 3.0, 250.0, -2.0])
def test_scaling_the_weights_changes_nothing_but_the_sign_and_shrinks_their_gradient(a):
    torch.manual_seed(0)
    u = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 7, dtype=torch.float64)
    grad_y = torch.randn(50, 4, dtype=torch.float64)
    eps = 1e-14
    outcomes = []
    for factor in (1.0, a):
        weights = (factor * w).requires_grad_()
        y = batch_norm(u @ weights.T, eps=eps)
        outcomes.append((y.detach(), *torch.autograd.grad(y, (u, weights), grad_y)))
    (y, grad_u, grad_w), (y_a, grad_u_a, grad_w_a) = outcomes
    sign = 1 if a > 0 else -1
    torch.testing.assert_close(y_a, sign * y, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(grad_u_a, sign * grad_u, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(grad_w_a, sign * grad_w / a, rtol=1e-7, atol=1e-7 / abs(a))
    # hence the gradient of each unit's weights is orthogonal to them
    assert ((grad_w * w).sum(1).abs() < 1e-8 * grad_w.norm() * w.norm()).all()


def test_statistics_are_biased_and_carry_no_graph():
    x, gamma, beta, _ = make((6, 3, 5))
    y, mean, var = batch_norm_with_statistics(x.requires_grad_(), gamma.requires_grad_(), beta)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad
    torch.testing.assert_close(mean, x.detach().mean((0, 2)))
    torch.testing.assert_close(var, x.detach().var((0, 2), correction=0))


@settings(max_examples=100, deadline=None)
@given(shapes, layouts, dtypes, st.integers(0, 2**16), st.sampled_from([None, 1, 2**18]))
def test_inference_is_torchs_evaluation_mode(shape, layout, dtype, seed, block):
    x, gamma, beta, mean = (t.float() for t in make(shape, torch.float64, seed))
    mean = mean.transpose(0, 1).flatten(1)[:, 0]
    var = gamma.square() + 0.1
    x = lay_out(x.to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [t.to(wide) for t in (mean, var, gamma, beta)]
    with computed_by_kernels(block):
        y = batch_norm_inference(x, *vectors, eps=1e-3)
    want = torch.nn.functional.batch_norm(
        x.double(), *(t.double() for t in vectors), training=False, eps=1e-3
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
