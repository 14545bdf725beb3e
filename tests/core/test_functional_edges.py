"""Large means, constant channels, half precision, odd layouts, nothing at all, and bad input."""

import pytest
import torch

from bnlib._core import autograd, kernels
from bnlib.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_steps,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_with_statistics,
)


@pytest.fixture(params=[None, 2**12, 2**18], ids=["formulas", "blocks", "one block"])
def computed_by(request, monkeypatch):
    """The formulas, or the kernels whatever the size of the tensor."""
    if request.param is not None:
        monkeypatch.setattr(autograd, "SMALL", 0)
        monkeypatch.setattr(kernels, "_BLOCK", request.param)


TRAINING = [batch_norm, lambda *a: batch_norm_forward(*a).y]


@pytest.mark.parametrize("transform", TRAINING)
@pytest.mark.parametrize("mean", [0.0, 30.0, 1e3, 1e6, -1e6])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("computed_by")
def test_a_large_mean_costs_no_precision(transform, mean, channels_last):
    # float32 near 1e6 has a step of 1/16; the reference sees the same rounded values
    x = (torch.randn(16, 3, 40, 50, generator=torch.manual_seed(0)) + mean).requires_grad_()
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    gamma, beta, grad_y = torch.tensor([1.0, -2, 0.5]), torch.zeros(3), torch.randn(x.shape)
    y = transform(x, gamma, beta)
    exact = x.detach().double().requires_grad_()
    want = torch.nn.functional.batch_norm(
        exact, None, None, gamma.double(), beta.double(), training=True
    )
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.autograd.grad(y, x, grad_y)[0]
    wanted = torch.autograd.grad(want, exact, grad_y.double())[0]
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rolled", [0, 1])
def test_one_example_unlike_the_rest_costs_no_precision(rolled):
    x = torch.cat([torch.zeros(1, 2, 400, 400), torch.randn(8, 2, 400, 400) + 1e5]).roll(rolled, 0)
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(batch_norm(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e15, 1e18])
def test_magnitudes_at_both_ends_of_float32_stay_finite(size):
    x = torch.randn(64, 4, generator=torch.manual_seed(0)) * size + 300 * size
    y = batch_norm(x)
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 12345.678])
def test_a_constant_channel_becomes_beta_and_gets_no_gradient(value):
    x = torch.randn(6, 3, 5)
    x[:, 1] = value
    x.requires_grad_()
    gamma, beta = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    y, _, var = batch_norm_with_statistics(x, gamma, beta)
    torch.testing.assert_close(y[:, 1], torch.full((6, 5), 5.0))
    assert var[1] == 0
    # the derivative is gamma / sqrt(eps) times what is left of a uniform gradient: nothing
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    torch.testing.assert_close(grad[:, 1], torch.zeros(6, 5), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, parameters):
    x = (torch.randn(32, 4, 17, generator=torch.manual_seed(0)) * 50 + 100).to(dtype)
    gamma, beta = (t.to(parameters or dtype) for t in (torch.rand(4) + 1, torch.randn(4)))
    y, mean, var = batch_norm_with_statistics(x, gamma, beta)
    want, mean32, var32 = batch_norm_with_statistics(x.float(), gamma.float(), beta.float())
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, mean32)
    torch.testing.assert_close(var, var32)
    torch.testing.assert_close(y, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("computed_by")
def test_under_autocast_statistics_stay_in_float32():
    x = torch.randn(16, 4, 9) * 10 + 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = batch_norm(x)
    torch.testing.assert_close(y, batch_norm(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (4, 0), (2, 0, 3, 3)])
def test_nothing_in_nothing_out(shape):
    x = torch.randn(shape, requires_grad=True)
    gamma, beta = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    y, mean, var = batch_norm_with_statistics(x, gamma, beta)
    assert y.shape == shape
    assert mean.shape == var.shape == (shape[1],)
    assert not mean.isnan().any()
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(gamma.grad, torch.zeros(shape[1]))
    fixed = batch_norm_inference(x, torch.zeros(shape[1]), torch.ones(shape[1]), gamma, beta)
    assert fixed.shape == shape


@pytest.mark.usefixtures("computed_by")
def test_the_result_keeps_the_memory_format_and_the_arguments_their_values():
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert batch_norm(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    sequence = torch.randn(4, 7, 3).transpose(1, 2)  # (N, L, C) read as (N, C, L)
    assert batch_norm(sequence).stride() == sequence.stride()


@pytest.mark.usefixtures("computed_by")
def test_infinite_and_missing_values_show_in_their_channel_alone():
    x = torch.randn(8, 3, 4)
    x[0, 1, 0] = float("nan")
    x[0, 2, 0] = float("inf")
    y = batch_norm(x)
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().all()
    assert not y[:, 2].isfinite().any()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (1, 1, 1, 1, 1)])
def test_one_value_per_channel_is_refused_in_training_and_fine_in_inference(shape):
    x, ones = torch.randn(shape), torch.ones(shape[1])
    for transform in TRAINING:
        with pytest.raises(ValueError, match=r"single value in each channel.*drop_last=True"):
            transform(x)
    with pytest.raises(ValueError, match="single value"):
        batch_norm_backward_steps(x, x)
    torch.testing.assert_close(batch_norm_inference(x, 0 * ones, ones, eps=1e-12), x)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_an_eps_that_stabilizes_nothing_is_refused(eps):
    x = torch.randn(4, 3)
    for call in (
        lambda: batch_norm(x, eps=eps),
        lambda: batch_norm_forward(x, eps=eps),
        lambda: batch_norm_backward_steps(x, x, eps=eps),
        lambda: batch_norm_inference(x, torch.zeros(3), torch.ones(3), eps=eps),
    ):
        with pytest.raises(ValueError, match="positive, finite"):
            call()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int64), TypeError, r"int64.*float32.*x\.float\(\)"),
        (torch.ones(4, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(4, 3, dtype=torch.bool), TypeError, "bool"),
        ([[1.0, 2.0]], TypeError, "not list"),
        (torch.randn(4), ValueError, r"1 axes.*\(N, C\)"),
        (torch.randn(2, 3, 1, 1, 1, 1), ValueError, "6 axes"),
    ],
)
def test_inputs_of_the_wrong_kind_are_named(x, error, message):
    for call in (
        lambda: batch_norm(x),
        lambda: batch_norm_forward(x),
        lambda: batch_norm_inference(x, torch.zeros(3), torch.ones(3)),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (torch.ones(4), ValueError, r"{} has shape \(4,\).*3 channels.*shape \(3,\)"),
        (torch.ones(3, 1), ValueError, r"{} has shape \(3, 1\)"),
        (torch.ones(3, dtype=torch.float64), TypeError, "{} has dtype float64.*must be float32"),
        (2.0, TypeError, "{} must be a torch.Tensor, not float"),
    ],
)
def test_parameters_that_do_not_fit_are_named(name, vector, error, message):
    with pytest.raises(error, match=message.format(name)):
        batch_norm(torch.randn(5, 3), **{name: vector})


def test_gradients_and_intermediates_that_do_not_fit_are_named():
    x = torch.randn(5, 3)
    forward = batch_norm_forward(x)
    with pytest.raises(ValueError, match=r"grad_y has shape \(4, 3\).*x has \(5, 3\)"):
        batch_norm_backward_steps(x[:4], x)
    with pytest.raises(ValueError, match=r"grad_y has shape .* x_hat has"):
        batch_norm_backward(x[:4], forward.x_hat, forward.inv_std)
    with pytest.raises(ValueError, match="inv_std has shape"):
        batch_norm_backward(x, forward.x_hat, forward.inv_std[:2])


@pytest.mark.parametrize(
    ("mean", "var", "message"),
    [
        ([0.0, 0, 0], [1.0, -0.5, 1], "var of channel 1 is -0.5"),
        ([0.0, 0, 0], [1.0, 1, float("nan")], "var of channel 2 is nan"),
        ([float("inf"), 0, 0], [1.0, 1, 1], "mean of channel 0 is inf"),
    ],
)
def test_statistics_that_no_data_can_have_are_refused(mean, var, message):
    with pytest.raises(ValueError, match=message):
        batch_norm_inference(torch.randn(2, 3), torch.tensor(mean), torch.tensor(var))
