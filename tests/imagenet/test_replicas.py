"""Many replicas, simulated in one process, against processes that really train together."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_runs import (
    QUIET,
    SMALL,
    TINY,
    TinyNetwork,
    finished,
    ranks,
    tensors,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlib import BatchNorm, population_statistics
from bnlib.imagenet import Recipe, checkpoint
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.evaluation.accuracy import load_network
from bnlib.imagenet.options import Options
from bnlib.imagenet.replicas import SynchronousReplicas, simulate
from bnlib.imagenet.training.loop import train
from bnlib.imagenet.training.state import State
from bnlib.imagenet.training.step import compute_loss, seed_dropout
from bnlib.modules import GhostBatchNorm


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(run: State) -> dict[str, Any]:
    """A simulated run as a checkpoint has it."""
    return tensors(
        {
            "step": run.step,
            "model": run.model.state_dict(),
            "average": run.averaged().state_dict() if run.average is not None else {},
            "optimizer": run.optimizer.state_dict(),
        }
    )


def real(recipe: Recipe, data: Path, out: Path, world: int, options: Options = QUIET) -> Any:
    assert finished(*ranks(world, recipe, data, [out], options)) == [0] * world
    return checkpoint.load(out)


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [
        name
        for name, value in a.items()
        if not (torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name])
    ]


# Against real processes


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "recipe",
    [TINY, TINY.replace(polyak=0.0, weight_decay=0.1, seed=11)],
    ids=["dropout and averaged weights", "without averaging"],
)
def test_two_simulated_replicas_have_every_bit_of_two_processes(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    assert recipe.momentum > 0
    assert recipe.weight_decay > 0
    ours = simulate(recipe, data, 2)
    theirs = real(recipe, data, tmp_path, 2)
    assert different(state_of(ours.state), tensors(theirs)) == []
    evaluated = load_network(tmp_path)[0].state_dict()
    assert different(ours.network.state_dict(), evaluated) == []
    one = simulate(recipe, data, 1)
    names = different(state_of(one.state), tensors(theirs))
    assert any("conv1.weight" in name for name in names), "replicas matter"


def test_two_simulated_replicas_of_bn_inception_have_every_bit_of_two_processes(
    data: Path, tmp_path: Path
) -> None:
    recipe = SMALL.replace(steps=2)
    ours = simulate(recipe, data, 2)
    theirs = real(recipe, data, tmp_path, 2)
    assert different(state_of(ours.state), tensors(theirs)) == []
    evaluated = load_network(tmp_path)[0].state_dict()
    assert different(ours.network.state_dict(), evaluated) == []


@pytest.mark.usefixtures("tiny")
def test_four_processes_differ_from_four_simulated_replicas_by_the_order_of_addition_alone(
    data: Path, tmp_path: Path
) -> None:
    exact = {"momentum": 0.0, "weight_decay": 0.0, "polyak": 0.0, "learning_rate": 1.0}
    recipe = TINY.replace(batch_size=8, steps=1, **exact)
    after = real(recipe, data, tmp_path, 4)["model"]
    torch.manual_seed(recipe.seed)
    model = TinyNetwork(recipe).to(memory_format=torch.channels_last)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    quarters = quarter_gradients(model, recipe, data)
    one_order_does = torch.ones(4, dtype=torch.bool)
    for name, start in before.items():
        around = []
        for first in range(4):  # a message travels around a ring of processes
            total = quarters[first][name]
            for hop in (1, 2, 3):
                total = total + quarters[(first - hop) % 4][name]
            around.append(start - total == after[name])
        fits = torch.stack(around).flatten(1)
        assert bool(fits.any(0).all()), name
        one_order_does &= fits.all(1)
    assert not one_order_does.any(), "the order changes with the place in the message"
    ours = simulate(recipe, data, 4).state.model.state_dict()
    torch.testing.assert_close(ours, after, atol=1e-6, rtol=1e-5)


def quarter_gradients(model: nn.Module, recipe: Recipe, data: Path) -> list[dict[str, Tensor]]:
    """A quarter of each of four replicas' gradients at the first step."""
    source, found = open_source(data, "train"), []
    for rank in range(4):
        _, images, labels = next(batches(source, recipe, rank=rank, world=4))
        seed_dropout(recipe, 0, rank)
        model.zero_grad()
        output = model(images.to(memory_format=torch.channels_last))
        compute_loss(output, labels).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: gradient / 4 for name, gradient in gradients.items()})
    return found


@pytest.mark.usefixtures("tiny")
def test_micro_batches_learn_the_parameters_of_replicas_and_move_their_averages_oftener(
    data: Path, tmp_path: Path
) -> None:
    recipe = TINY.replace(dropout=0.0)  # whose seeds differ
    ours = simulate(recipe, data, 2).state.model
    train(recipe.replace(accumulate=2), data, tmp_path, QUIET)
    theirs = checkpoint.load(tmp_path)["model"]
    for name, value in ours.named_parameters():
        torch.testing.assert_close(theirs[name], value.detach(), atol=1e-6, rtol=1e-5)
    assert int(theirs["norm1.num_batches_tracked"]) == 2 * recipe.steps
    assert int(ours.state_dict()["norm1.num_batches_tracked"]) == recipe.steps


# The simulation by itself


def small(channels: int = 5, ghost: int | None = None) -> nn.Sequential:
    torch.manual_seed(3)
    norm = BatchNorm(channels) if ghost is None else GhostBatchNorm(channels, ghost)
    convolution = nn.Conv2d(2, channels, 3, bias=False)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), nn.Linear(channels * 4, 3))


def mean_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(x), labels)


def examples(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64) + 1
    return x, torch.randint(3, (n,), generator=generator)


def shares(n: int, replicas: int) -> list[tuple[Tensor, Tensor]]:
    x, labels = examples(n)
    return list(zip(x.chunk(replicas), labels.chunk(replicas), strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_replicas_compute_the_gradient_of_ghost_batches(replicas: int) -> None:
    model, ghosts = small().double(), small(ghost=12 // replicas).double()
    losses = SynchronousReplicas(model, replicas).backward(shares(12, replicas), mean_loss)
    whole = mean_loss(ghosts, *examples())
    whole.backward()
    assert losses.shape == (replicas,)
    torch.testing.assert_close(losses.mean(), whole.detach())
    torch.testing.assert_close(gradients(model), gradients(ghosts))
    assert gradients(model).keys() == {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias"}


def test_the_running_statistics_are_those_of_replica_0_and_each_starts_from_them() -> None:
    model = small().double()
    together = SynchronousReplicas(model, 3)
    for step in range(2):
        start = small().double()
        start.load_state_dict(model.state_dict())
        together.backward(shares(12, 3), mean_loss)
        for rank, (x, _) in enumerate(shares(12, 3)):
            alone = small().double()
            alone.load_state_dict(start.state_dict())
            alone(x)
            for name, buffer in alone.named_buffers():
                assert torch.equal(together.buffers[rank][name], buffer), (step, rank, name)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, together.buffers[0][name])
        means = [buffers["1.running_mean"] for buffers in together.buffers]
        assert not torch.equal(means[0], means[1])


def test_a_parameter_without_gradient_stays_without() -> None:
    model = small().double()
    model[4].bias.requires_grad_(False)
    SynchronousReplicas(model, 2).backward(shares(12, 2), mean_loss)
    assert model[4].bias.grad is None
    assert model[4].weight.grad is not None


def test_each_replica_is_announced_before_its_forward_pass() -> None:
    seen: list[object] = []

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        seen.append("forward")
        return mean_loss(model, x, labels)

    SynchronousReplicas(small().double(), 2).backward(shares(12, 2), loss, seen.append)
    assert seen == [0, "forward", 1, "forward"]


@pytest.mark.usefixtures("tiny")
def test_population_statistics_are_averaged_over_the_replicas(data: Path) -> None:
    recipe = TINY.replace(batch_size=6, steps=2, statistics_batches=4)
    ours = simulate(recipe, data, 3)
    source, alone = open_source(data, "train"), []
    for rank in range(3):
        stream = batches(source, recipe, start_step=2, rank=rank, world=3)
        own = [images for _, images, _ in itertools.islice(stream, 4)]
        alone.append(population_statistics(ours.state.averaged(), own))
    for layer, kind in itertools.product(("norm1", "norm2"), ("running_mean", "running_var")):
        values = torch.stack([each.get_buffer(f"{layer}.{kind}") for each in alone])
        torch.testing.assert_close(ours.network.get_buffer(f"{layer}.{kind}"), values.mean(0))
        assert not torch.equal(values[0], values[1])
        assert int(ours.network.get_buffer(f"{layer}.num_batches_tracked")) == 4


@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"precision": "bf16"}, {"statistics": "moving"}]
)
def test_a_recipe_with_what_is_not_simulated_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .* can be simulated"):
        simulate(TINY.replace(**changes), tmp_path, 2)


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="replicas is 0"):
        SynchronousReplicas(small(), 0)
    together = SynchronousReplicas(small().double(), 3)
    with pytest.raises(ValueError, match=r"2 shares of \[6\] examples.*chunk\(3\)"):
        together.backward(shares(12, 2), mean_loss)
    with pytest.raises(ValueError, match=r"3 shares of \[3, 4\]"):
        together.backward(shares(11, 3), mean_loss)
