"""Many small networks of any kind trained at once, as one network with as many times the channels.

A *stack* of ``S`` networks is one network whose activations have ``S`` times the channels: one of
shape ``(m, C)`` or ``(m, C, H, W)`` becomes ``(m, S * C)`` or ``(m, S * C, H, W)``, network after
network. Whatever treats channels apart works unchanged: :class:`bnlib.modules.BatchNorm`, every
nonlinearity, ``torch.nn.Dropout``, and ``torch.nn.Conv2d`` with ``groups=S``. Only the linear layer
needs a counterpart, :class:`StackedLinear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["StackedLinear", "accuracy", "mini_batches", "predict", "stacked_perceptron", "train"]


class StackedLinear(nn.Module):
    """``S`` linear layers side by side, ``networks`` of them.

    ``weight`` has the shape ``(S, inputs, outputs)`` and is Gaussian with standard deviation
    ``gain / sqrt(inputs)``, drawn from torch's global generator; ``bias``, which starts at 0, has
    the shape ``(S * outputs,)``, or is None.
    """

    def __init__(
        self, networks: int, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        if min(networks, inputs, outputs) < 1:
            raise ValueError(
                "networks, inputs and outputs must be at least 1, got "
                f"{networks}, {inputs}, {outputs}"
            )
        self.weight = nn.Parameter(gain / inputs**0.5 * torch.randn(networks, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(networks * outputs)) if bias else None

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        networks, inputs, outputs = self.weight.shape
        return f"{networks} x ({inputs} -> {outputs}), bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Each network's ``W u + b``: ``(m, S * inputs)`` to ``(m, S * outputs)``."""
        networks, inputs, _ = self.weight.shape
        if x.ndim != 2 or x.shape[1] != networks * inputs:
            raise ValueError(
                f"x must have shape (m, {networks} * {inputs}), got {tuple(x.shape)}; "
                "put nn.Flatten() before a linear layer that follows a convolution"
            )
        u = x.view(len(x), networks, inputs).transpose(0, 1)
        if self.bias is None:
            y = torch.bmm(u, self.weight)
        else:
            y = torch.baddbmm(self.bias.view(networks, 1, -1), u, self.weight)
        return y.transpose(0, 1).reshape(len(x), -1)


def stacked_perceptron(
    networks: int,
    sizes: Sequence[int],
    block: Callable[[int], Iterable[nn.Module]],
    *,
    bias: bool = False,
    gain: float = 1.0,
) -> nn.Sequential:
    """Fully connected networks side by side: linear layer, block, linear layer, block, ..., linear.

    It maps ``(m, S * inputs)`` to logits ``(m, S * classes)``.

    Parameters
    ----------
    sizes
        Inputs, hidden units of each layer (one at least), classes: ``(196, 100, 100, 10)``.
    block
        Called with the number of channels of each hidden layer (units times ``S``); returns what
        follows the linear layer there, as ``lambda n: [BatchNorm(n), nn.ReLU()]``.
    bias
        Whether the hidden linear layers have a bias. The last one always has.
    gain
        As in :class:`StackedLinear`.
    """
    if len(sizes) < 3:
        raise ValueError(
            f"sizes must name the inputs, at least one hidden layer and the classes; got {sizes}"
        )
    layers: list[nn.Module] = []
    for inputs, units in pairwise(sizes[:-1]):
        layers.append(StackedLinear(networks, inputs, units, bias=bias, gain=gain))
        layers.extend(block(networks * units))
    layers.append(StackedLinear(networks, sizes[-2], sizes[-1], gain=gain))
    return nn.Sequential(*layers)


def mini_batches(
    images: Tensor, labels: Tensor, size: int, seeds: Sequence[int], *, stream: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless mini-batches, each seed in an order of its own, each epoch without replacement.

    Yields ``x`` of shape ``(S, size, inputs)``, which is overwritten by the next one, and labels
    ``(S, size)``. What remains of an epoch is left out.

    Parameters
    ----------
    images, labels
        ``(N, inputs)`` float32 and ``(N,)`` int64; ``size`` is at most ``N``.
    seeds
        One per network.
    stream
        Another number gives an independent order for the same seeds.
    """
    count = len(images)
    if size > count:
        raise ValueError(f"a mini-batch of {size} cannot be drawn from {count} examples")
    generators = [torch.Generator().manual_seed((stream + 1) * 1_000_003 + seed) for seed in seeds]
    x = torch.empty(len(seeds) * size, images.shape[1])  # in the layout of a stack
    while True:
        order = torch.stack([torch.randperm(count, generator=each) for each in generators])
        for start in range(0, count - size + 1, size):
            chosen = order[:, start : start + size]
            torch.index_select(images, 0, chosen.T.flatten(), out=x)
            yield x.view(size, len(seeds), -1).transpose(0, 1), labels[chosen]


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float | Sequence[float] | Tensor,
) -> Tensor:
    """Plain stochastic gradient descent on each network's mean cross-entropy, in place.

    A network that diverges does not disturb the others. When training ends, all its parameters
    and statistics are set to zero: it then answers at chance.

    Parameters
    ----------
    model
        Maps ``(m, S * inputs)`` to ``(m, S * classes)``. The leading axis of each of its parameters
        counts channels, or networks. It is left in training mode.
    batches
        As those of :func:`mini_batches`.
    learning_rate
        One for all, or one for each network.

    Returns
    -------
    Tensor
        ``(steps, S)``: the loss in nats before each step; NaN from the first step at which it was
        not finite.
    """
    model.train()
    rate = torch.as_tensor(learning_rate, dtype=torch.float64)
    parameters = list(model.parameters())
    losses = []
    for _ in range(steps):
        loss = _losses(model, *next(batches))
        # Networks share no parameter, and gradients are linear in the loss: those of the sum of
        # all losses, each times its learning rate, are each network's own steps.
        taken = torch.autograd.grad((rate * loss).sum(), parameters)
        with torch.no_grad():
            for parameter, step in zip(parameters, taken, strict=True):
                parameter.sub_(step)
        losses.append(loss.detach())
    history = torch.stack(losses)
    history[(~history.isfinite()).cumsum(0) > 0] = torch.nan
    _zero_diverged(model, ~history[-1].isfinite())
    return history


def _losses(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Each network's mean cross-entropy on its own mini-batch, ``(S,)``."""
    networks, m = labels.shape
    logits = model(x.transpose(0, 1).reshape(m, -1)).view(m * networks, -1)
    loss = nn.functional.cross_entropy(logits, labels.T.reshape(-1), reduction="none")
    return loss.view(m, networks).mean(0)


@torch.no_grad()
def _zero_diverged(model: nn.Module, diverged: Tensor) -> None:
    rows = [
        tensor.view(len(diverged), -1)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.ndim  # all but the count of batches
    ]
    for row in rows:
        diverged = diverged | ~row.isfinite().all(1)
    for row in rows:
        row[diverged] = 0


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, networks: int) -> Tensor:
    """Every network's logits in evaluation mode, ``(S, N, classes)``, for images ``(N, inputs)``.

    The model is as for :func:`train`; its mode is left as it was.
    """
    training = model.training
    model.eval()
    logits = [
        model(part.repeat(1, networks)).view(len(part), networks, -1) for part in images.split(1000)
    ]
    model.train(training)
    return torch.cat(logits).transpose(0, 1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, networks: int) -> Tensor:
    """Every network's fraction of correctly classified images, ``(S,)``; see :func:`predict`."""
    return (predict(model, images, networks).argmax(2) == labels).float().mean(1)
