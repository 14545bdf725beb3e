"""Derivatives of every order and mode, under every transform torch has, in float64."""

import shutil

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from bnlib._core import autograd
from bnlib.functional import batch_norm, batch_norm_forward, batch_norm_inference


@pytest.fixture(params=["formulas", "kernels"])
def computed_by(request, monkeypatch):
    """The formulas, or the kernels whatever the size of the tensor."""
    if request.param == "kernels":
        monkeypatch.setattr(autograd, "SMALL", 0)


SHAPES = [(4, 3), (3, 2, 4), (2, 3, 2, 3), (2, 2, 2, 1, 3)]


def inputs(shape, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    vectors = [random(shape[1]) for _ in range(count - 1)]
    return random(*shape), *vectors


def plain(x, gamma, beta, eps=1e-5):
    """The transform in plain operations: what autograd makes of it is the reference."""
    return batch_norm_forward(x, gamma, beta, eps).y


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("shape", SHAPES)
def test_first_derivatives_pass_gradcheck_in_both_modes(shape):
    tensors = [t.requires_grad_() for t in inputs(shape)]
    assert gradcheck(batch_norm, tensors, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_second_derivatives_pass_gradgradcheck_with_random_upstream_gradients(shape, eps):
    tensors = [t.requires_grad_() for t in inputs(shape)]
    grad_y = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def transform(x, gamma, beta):
        return batch_norm(x, gamma, beta, eps)

    assert gradgradcheck(
        transform, tensors, [grad_y], check_batched_grad=True, check_fwd_over_rev=True
    )


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_second_derivatives_are_right_when_only_one_input_wants_them(wanted):
    tensors = list(inputs((5, 3, 2)))
    tensors[wanted].requires_grad_()
    grad_y = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for transform in (batch_norm, plain):
        grad = torch.autograd.grad(transform(*tensors), tensors[wanted], grad_y, create_graph=True)
        targets = [tensors[wanted], grad_y]
        along = torch.linspace(-1, 2, grad[0].numel(), dtype=torch.float64).view_as(grad[0])
        results.append(torch.autograd.grad(grad[0], targets, along, materialize_grads=True))
    for closed, reference in zip(*results, strict=True):
        torch.testing.assert_close(closed, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("computed_by")
def test_a_third_derivative_is_neither_refused_nor_wrong():
    tensors = [t.requires_grad_() for t in inputs((6, 2, 3))]
    directions = [[torch.randn_like(t) for t in tensors] for _ in range(2)]
    grad_y = torch.randn(6, 2, 3, dtype=torch.float64)
    results = []
    for transform in (batch_norm, plain):
        grads = torch.autograd.grad(transform(*tensors), tensors, grad_y, create_graph=True)
        for direction in directions:
            total = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
            grads = torch.autograd.grad(total, tensors, create_graph=True, materialize_grads=True)
        results.append(grads)
    assert all(t.abs().max() > 1e-3 for t in results[1][:2])  # otherwise nothing was compared
    for closed, reference in zip(*results, strict=True):
        torch.testing.assert_close(closed, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("computed_by")
def test_a_uniform_upstream_gradient_gives_no_gradient_to_x():
    x, gamma, beta = (t.requires_grad_() for t in inputs((6, 3, 4)))
    grad = torch.autograd.grad(batch_norm(x, gamma, beta).sum(), x)[0]
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_inference_passes_gradcheck_and_gradgradcheck_in_every_tensor(shape):
    x, mean, var, gamma, beta = inputs(shape, 5)
    tensors = [t.requires_grad_() for t in (x, mean, var.square() + 0.1, gamma, beta)]
    assert gradcheck(batch_norm_inference, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(batch_norm_inference, tensors, check_batched_grad=True)


@pytest.mark.usefixtures("computed_by")
def test_vmap_is_a_loop():
    x, gamma = torch.randn(5, 4, 3, 2), torch.randn(5, 3)
    looped = torch.stack([batch_norm(a, b) for a, b in zip(x, gamma, strict=True)])
    torch.testing.assert_close(torch.vmap(batch_norm)(x, gamma), looped)
    moved = torch.vmap(batch_norm, in_dims=(2, None), out_dims=2)(x.movedim(0, 2), gamma[0])
    looped = torch.stack([batch_norm(a, gamma[0]) for a in x])
    torch.testing.assert_close(moved.movedim(2, 0), looped)
    mean, var = torch.randn(5, 3), torch.rand(5, 3)
    looped = torch.stack([batch_norm_inference(x[0], a, b) for a, b in zip(mean, var, strict=True)])
    mapped = torch.vmap(batch_norm_inference, in_dims=(None, 0, 0))(x[0], mean, var)
    torch.testing.assert_close(mapped, looped)


def test_functional_transforms_compose():
    x, gamma, beta = inputs((3, 2, 2))
    grad_y = torch.randn_like(x)

    def loss(x, transform):
        return (transform(x, gamma, beta).pow(3) * grad_y).sum()

    closed = torch.func.hessian(loss)(x, batch_norm)
    reference = torch.autograd.functional.hessian(lambda x: loss(x, plain), x)
    torch.testing.assert_close(closed, reference)

    batch = torch.randn(4, *x.shape, dtype=torch.float64)
    each = torch.vmap(torch.func.grad(lambda x: loss(x, batch_norm)))(batch)
    looped = torch.stack([torch.func.grad(lambda x: loss(x, plain))(x) for x in batch])
    torch.testing.assert_close(each, looped)


@pytest.mark.usefixtures("computed_by")
def test_changing_x_in_place_before_the_backward_pass_is_an_error():
    x = torch.randn(4, 3)
    y = batch_norm(x, torch.ones(3, requires_grad=True))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_y_in_place_is_fine():
    x = torch.randn(4, 3, requires_grad=True)
    got, want = (torch.relu_(batch_norm(x)), torch.relu(batch_norm(x)))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))


@pytest.mark.usefixtures("computed_by")
def test_forward_mode_passes_through_tensors_that_want_no_gradient():
    x, mean, var, gamma, beta = inputs((5, 3, 2), 5)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        trained = forward_ad.unpack_dual(batch_norm(dual, gamma, beta)).tangent
        inferred = batch_norm_inference(dual, mean, var.square() + 0.1, gamma, beta)
        inferred = forward_ad.unpack_dual(inferred).tangent
    want = torch.autograd.functional.jvp(lambda x: plain(x, gamma, beta), x, tangent)[1]
    torch.testing.assert_close(trained, want)
    scale = gamma * (var.square() + 0.1 + 1e-5).rsqrt()
    torch.testing.assert_close(inferred, tangent * scale[:, None])


def test_no_gradient_from_above_is_none_below():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(4, 3, requires_grad=True)
    Nothing.apply(batch_norm(x)).sum().backward()
    assert x.grad is None


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile on a CPU needs a C++ compiler (g++ or clang++)",
)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_without_graph_breaks_it_gives_the_same_values_and_gradients(backend):
    tensors = [t.float().requires_grad_() for t in inputs((8, 3, 4, 5))]
    grad_y = torch.randn(8, 3, 4, 5)
    compiled = torch.compile(batch_norm, fullgraph=True, backend=backend)
    y, want = compiled(*tensors), batch_norm(*tensors)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(y, tensors, grad_y),
        torch.autograd.grad(want, tensors, grad_y),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    inference = torch.compile(batch_norm_inference, fullgraph=True, backend=backend)
    fixed = (tensors[0], tensors[1], tensors[1].square() + 0.1)
    torch.testing.assert_close(
        inference(*fixed), batch_norm_inference(*fixed), rtol=1e-4, atol=1e-5
    )
