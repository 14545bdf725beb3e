"""Norm(x, 𝒳) with and without the derivative through 𝒳."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch
from torch import Tensor, nn

from bnlib.detached import KINDS, Norm, live, norm, split_gradient
from bnlib.functional import batch_norm
from bnlib.mnist.stacks import stacked_perceptron, train
from bnlib.whitening import whiten

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_norm_is_the_transform_of_the_other_rooms_when_x_is_its_own_examples() -> None:
    x = 3 * random(20, 4) + 5
    torch.testing.assert_close(norm(x, x, "center"), x - x.mean(0))
    torch.testing.assert_close(norm(x, x, "scale", eps=1e-3), batch_norm(x, eps=1e-3))
    torch.testing.assert_close(norm(x, x, "whiten", eps=1e-3), whiten(x, eps=1e-3))


@each_kind
def test_one_example_is_normalized_with_the_statistics_of_the_others(kind: str) -> None:
    examples = 3 * random(30, 4) + 5
    whole = norm(examples, examples, kind)
    torch.testing.assert_close(norm(examples[7:8], examples, kind), whole[7:8])


@each_kind
def test_gradients_through_both_arguments_pass_gradcheck(kind: str) -> None:
    x, examples = random(3, 2).requires_grad_(), random(6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: norm(a, b, kind, 1e-2), (x, examples))


@each_kind
def test_the_two_parts_of_the_gradient_sum_to_the_true_one(kind: str) -> None:
    x, grad = random(12, 3).requires_grad_(), random(12, 3)
    parts = split_gradient(x, grad, kind)
    (true,) = torch.autograd.grad(norm(x, x, kind), x, grad)
    (detached,) = torch.autograd.grad(norm(x, x.detach(), kind), x, grad)
    torch.testing.assert_close(parts.direct + parts.through_examples, true)
    torch.testing.assert_close(parts.direct, detached)
    assert parts.through_examples.norm() > 0.1 * true.norm()


def test_what_is_lost_by_detaching_is_the_shift_and_the_scale() -> None:
    x, grad = random(12, 1), random(12, 1)
    lost = split_gradient(x, grad, "scale", eps=0).through_examples
    x_hat = norm(x, x, "scale", eps=0)
    sigma = x.std(0, correction=0)
    torch.testing.assert_close(lost, -(grad.mean() + x_hat * (grad * x_hat).mean()) / sigma)


def test_bias_grows_while_the_loss_stands_still() -> None:
    u, target = random(50, 1), random(50, 1) + 2
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses = []
    for _ in range(100):
        x = u + b
        loss = (norm(x, x.detach(), "center") - target).square().mean() / 2
        (gradient,) = torch.autograd.grad(loss, b)
        b = (b - 0.1 * gradient).detach().requires_grad_()
        losses.append(loss.detach())
    torch.testing.assert_close(b, 100 * 0.1 * target.mean()[None])
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(100), rtol=1e-12, atol=0)


def test_bias_rests_when_the_gradient_is_whole() -> None:
    u, target = random(50, 1), random(50, 1) + 2
    b = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        x = u + b
        (gradient,) = torch.autograd.grad((norm(x, x, kind) - target).square().mean(), b)
        assert gradient.abs().item() < 1e-12


@pytest.mark.parametrize("kind", ["scale", "whiten"])
def test_weight_norm_feels_a_radial_pull_only_when_detached(kind: str) -> None:
    u, target = random(60, 5), random(60, 3)
    u = u - u.mean(0)
    w = random(5, 3).requires_grad_()

    def radial(detach: bool) -> tuple[float, float]:
        x = u @ w
        x_hat = norm(x, x.detach() if detach else x, kind, eps=0)
        loss = (x_hat - 3 * target).square().sum() / 2
        gradient, g = torch.autograd.grad(loss, (w, x_hat))
        return (w * gradient).sum().item(), (g * x_hat).sum().item()

    pull, law = radial(detach=True)
    assert abs(law) > 1
    assert pull == pytest.approx(law, rel=1e-10)
    assert abs(radial(detach=False)[0]) < 1e-9


@each_kind
def test_a_live_layer_is_norm_of_its_own_batch_and_a_detached_one_differs_in_gradient_alone(
    kind: str,
) -> None:
    x, grad = random(20, 3).requires_grad_(), random(20, 3)
    whole, detached = Norm(kind, live=True)(x), Norm(kind)(x)
    torch.testing.assert_close(whole, norm(x, x, kind))
    torch.testing.assert_close(whole, detached)
    (true,) = torch.autograd.grad(whole, x, grad)
    (wrong,) = torch.autograd.grad(detached, x, grad)
    parts = split_gradient(x, grad, kind)
    torch.testing.assert_close(true, parts.direct + parts.through_examples)
    torch.testing.assert_close(wrong, parts.direct)


def test_statistics_are_held_for_as_many_training_passes_as_asked() -> None:
    batches = [random(10, 2) for _ in range(5)]
    layer = Norm("center", refresh=2)
    means = [batches[0].mean(0), batches[0].mean(0), batches[2].mean(0), batches[2].mean(0)]
    for x, mean in zip(batches, means, strict=False):
        torch.testing.assert_close(layer(x), x - mean)


def test_frozen_statistics_are_those_of_the_first_batch_for_ever() -> None:
    first, later = random(10, 2), random(10, 2) + 4
    layer = Norm("scale", refresh=None)
    layer(first)
    for _ in range(3):
        torch.testing.assert_close(layer(later), norm(later, first))


def test_a_pass_in_evaluation_mode_does_not_count() -> None:
    first, later = random(10, 2), random(10, 2) + 4
    layer = Norm("center", refresh=2)
    layer(first)
    layer.eval()
    for _ in range(3):
        torch.testing.assert_close(layer(later), later - first.mean(0))
    layer.train()
    torch.testing.assert_close(layer(later), later - first.mean(0))
    torch.testing.assert_close(layer(later), later - later.mean(0))


@each_kind
def test_networks_are_normalized_each_for_itself(kind: str) -> None:
    x = random(30, 6)
    together = Norm(kind, networks=2)(x)
    alone = torch.cat([Norm(kind)(x[:, :3]), Norm(kind)(x[:, 3:])], dim=1)
    torch.testing.assert_close(together, alone)


def test_a_diverged_network_does_not_stop_its_neighbor() -> None:
    x = random(30, 6)
    x[0, 0] = torch.inf
    y = Norm("whiten", networks=2)(x)
    assert y[:, :3].isnan().all()
    torch.testing.assert_close(y[:, 3:], norm(x[:, 3:], x[:, 3:], "whiten"))


def test_a_network_with_detached_statistics_trains_worse_and_its_weights_run_away() -> None:
    images, labels = random(400, 8).float(), torch.arange(400) % 4
    images[torch.arange(400), labels] += 3.0

    def outcome(keep: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        model = stacked_perceptron(
            1, (8, 16, 16, 4), lambda n: [Norm(live=keep), nn.Sigmoid()], bias=True
        )
        first = model[3].weight.detach().norm(dim=1)
        batches = repeat((images[None], labels[None]))
        losses = train(model, batches, steps=200, learning_rate=4.0)
        growth = model[3].weight.detach().norm(dim=1) / first
        return losses[-20:].mean().item(), growth.median().item()

    (whole_loss, whole_growth), (detached_loss, detached_growth) = outcome(True), outcome(False)
    assert detached_loss > 1.5 * whole_loss
    assert detached_growth > 3 * whole_growth


def test_live_makes_every_layer_whole_for_the_block_and_restores_each() -> None:
    model = nn.Sequential(Norm(), nn.ReLU(), Norm(live=True), nn.Sequential(Norm("center")))
    layers = [module for module in model.modules() if isinstance(module, Norm)]
    with live(model):
        assert all(layer.live for layer in layers)
    assert [layer.live for layer in layers] == [False, True, False]


def test_live_restores_when_the_block_fails() -> None:
    layer = Norm()
    with pytest.raises(ValueError, match="without units"), live(layer):
        raise ValueError("without units")
    assert not layer.live


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norm(x, x, "scales"), "center, scale, whiten.*'scales'"),
        (lambda x: norm(x, x, eps=-1.0), "eps.*-1.0"),
        (lambda x: norm(x, x, eps=float("nan")), "eps.*nan"),
        (lambda x: norm(x, x[:, :2]), r"\(4, 3\) and \(4, 2\)"),
        (lambda x: norm(x[..., None], x[..., None]), r"\(4, 3, 1\)"),
        (lambda x: norm(x, x[:1]), "at least two"),
        (lambda x: norm(x, x[:2], "whiten", 0.0), "singular"),
        (lambda x: split_gradient(x, x[:2]), r"\(2, 3\).*\(4, 3\)"),
        (lambda x: Norm("both"), "'both'"),
        (lambda x: Norm(eps=-1e-5), "-1e-05"),
        (lambda x: Norm(refresh=0), "None for never; got 0"),
        (lambda x: Norm(networks=0), "networks.*0"),
        (lambda x: Norm("whiten", networks=2)(x), "2 equal groups"),
        (lambda x: live(nn.ReLU()).__enter__(), "ReLU has no"),
    ],
)
def test_bad_input_is_refused_with_its_value_and_the_remedy(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(random(4, 3))


def test_integers_are_refused_by_name() -> None:
    x = torch.ones(4, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        norm(x, x.double())
    with pytest.raises(TypeError, match=r"examples.*int64"):
        norm(x.double(), x)
