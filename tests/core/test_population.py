"""Algorithm 2, lines 7 to 12, against the formula written out and against torch's update_bn."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnlib import BatchNorm, PerActivationBatchNorm, population_statistics


def network(norm=BatchNorm, norm2d=BatchNorm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), norm(5)
    )


def mini_batches(count=6, size=8, shape=(2, 5, 5)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator) * 2 + 1 for _ in range(count)]


def state(model):
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_one_layer_gets_the_mean_of_means_and_the_mean_of_unbiased_variances():
    layer = BatchNorm(3)
    batches = [torch.randn(7, 3, 2) * (k + 1) + k for k in range(4)]
    m = 14
    population_statistics(layer, batches)
    means = torch.stack([b.double().mean((0, 2)) for b in batches])
    biased = torch.stack([b.double().var((0, 2), correction=0) for b in batches])
    torch.testing.assert_close(layer.running_mean.double(), means.mean(0), rtol=1e-6, atol=1e-6)
    want = m / (m - 1) * biased.mean(0)  # line 10
    torch.testing.assert_close(layer.running_var.double(), want, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("kinds", [(BatchNorm, BatchNorm), (nn.BatchNorm1d, nn.BatchNorm2d)])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_torchs_update_bn_computes(kinds, training):
    model, reference = network(*kinds), network(*kinds)
    reference.load_state_dict(model.state_dict())
    for layer in model.modules():
        if hasattr(layer, "running_mean"):  # what was there before must not matter
            layer.running_mean.fill_(float("nan"))
    assert population_statistics(model.train(training), mini_batches()) is model
    update_bn(mini_batches(), reference)
    for (name, ours), theirs in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_labels_and_generators_and_lists_are_taken():
    plain, labelled = network(), network()
    population_statistics(plain, mini_batches())
    population_statistics(labelled, ([b, torch.zeros(8)] for b in mini_batches()))
    assert_unchanged(labelled, state(plain))
    population_statistics(labelled, [(b, None) for b in mini_batches()], device="cpu")
    assert_unchanged(labelled, state(plain))


def test_per_activation_layers_get_their_statistics():
    layer = PerActivationBatchNorm((2, 5, 5))
    batches = mini_batches()
    population_statistics(layer, batches)
    want = torch.stack([b.var(0) for b in batches]).mean(0)
    torch.testing.assert_close(layer.running_var, want, rtol=1e-5, atol=1e-6)


def test_modes_momentum_parameters_and_hooks_are_restored_exactly():
    model = network()
    model[1].momentum = None
    model.train()
    model[2].eval()
    model[5].eval()  # a frozen layer in a training model
    modes = [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    population_statistics(model, mini_batches())
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum is None
    assert model[5].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


class Fails(nn.Module):
    """Passes three mini-batches on, then raises."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 3:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("torn"), KeyboardInterrupt()])
def test_after_an_exception_everything_is_as_it_was(error):
    model = nn.Sequential(network(), Fails(error), BatchNorm(5))
    model[0](mini_batches()[0])
    model[0][1].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(type(error)):
        population_statistics(model, mini_batches())
    assert_unchanged(model, before)
    assert [m.training for m in model.modules()] == modes
    assert model[2].momentum == 0.1
    assert not model[2]._forward_hooks


def test_dropout_is_off_because_inference_has_none():
    model = nn.Sequential(nn.Dropout(0.5), BatchNorm(3))
    batches = [torch.randn(50, 3) + 2 for _ in range(4)]
    population_statistics(model.train(), batches)
    want = torch.stack([b.var(0) for b in batches]).mean(0)
    torch.testing.assert_close(model[1].running_var, want)


class Twice(nn.Module):
    """One layer used twice in a forward pass, one used never."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = BatchNorm(3), BatchNorm(3)

    def forward(self, x):
        return self.norm(self.norm(x) * 5 + 3)


def test_a_layer_used_twice_averages_over_both_uses_and_an_unused_one_keeps_its_own():
    model = Twice()
    model.unused.running_mean.fill_(7)
    batches = [torch.randn(9, 3) for _ in range(3)]
    population_statistics(model, batches)
    first = torch.stack([b.mean(0) for b in batches]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, (first + 3) / 2, rtol=1e-5, atol=1e-5)
    assert model.norm.num_batches_tracked == 6
    assert (model.unused.running_mean == 7).all()
    assert model.unused.num_batches_tracked == 0


def test_a_compiled_model_is_taken():
    model, reference = network(), network()
    population_statistics(torch.compile(model, backend="eager"), mini_batches())
    population_statistics(reference, mini_batches())
    assert_unchanged(model, state(reference))


def test_half_precision_layers_average_without_losing_small_contributions():
    layer = BatchNorm(1).half()
    batches = [torch.randn(64, 1, generator=torch.manual_seed(k)).half() + 4 for k in range(300)]
    population_statistics(layer, batches)
    want = torch.stack([b.double().var(0) for b in batches]).mean(0)
    torch.testing.assert_close(layer.running_var.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        (nn.Linear(3, 3), [torch.randn(4, 3)], ValueError, "no batch-normalization layer"),
        (BatchNorm(3), [], ValueError, "batches is empty"),
        (BatchNorm(3), [torch.randn(4, 3), torch.randn(3, 3)], ValueError, "1 has 3 .* have 4"),
        (BatchNorm(3), [torch.randn(1, 3)], ValueError, "single value in each channel"),
        (BatchNorm(3), [{"x": torch.randn(4, 3)}], TypeError, "mini-batch 0 is of type dict"),
        (BatchNorm(3), [("x", torch.randn(4, 3))], TypeError, "mini-batch 0 is of type tuple"),
        (BatchNorm(3), [torch.full((4, 3), float("nan"))], ValueError, "mean of layer 'model'"),
        (
            nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
            [torch.randn(4, 3)],
            ValueError,
            "layer '0' .*track_running_stats=True",
        ),
        (nn.ModuleDict({"norm": BatchNorm(3)}), [torch.randn(4, 3)], NotImplementedError, None),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(model, batches, error, message):
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        population_statistics(model, batches)
    assert_unchanged(model, before)
    assert [m.training for m in model.modules()] == modes


def test_a_model_that_reaches_no_layer_is_refused():
    model = Twice()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"reaches none .*norm, unused"):
        population_statistics(model, [torch.randn(4, 3)])
