"""Many small networks of any kind trained at once, as one network with as many times the channels.

A chapter compares several networks over several seeds. Side by side, ``S`` of them, the *replicas*,
are one network whose activations have ``S`` times the channels: an activation of shape ``(m, C)``
or ``(m, C, H, W)`` becomes ``(m, S * C)`` or ``(m, S * C, H, W)``, replica after replica. Whatever
treats channels apart works unchanged: :class:`bnlib.modules.BatchNorm`, every nonlinearity,
``torch.nn.Dropout``, and ``torch.nn.Conv2d`` with ``groups=S``. Only the linear layer needs a
counterpart, :class:`StackedLinear`.

:mod:`bnlib.mnist.replicas` does the same for the sigmoid networks of section 4.1 alone, with a
hand-written gradient, and is faster there. This module uses autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["StackedLinear", "accuracy", "predict", "stacked_perceptron", "train"]


class StackedLinear(nn.Module):
    """``S`` linear layers side by side.

    Parameters
    ----------
    replicas
        How many layers, ``S``.
    inputs, outputs
        Features of each.
    bias
        Whether each output has a bias; it starts at 0.
    gain
        The weights are Gaussian with standard deviation ``gain / sqrt(inputs)``, drawn from
        torch's global generator.

    Attributes
    ----------
    weight
        ``(S, inputs, outputs)``.
    bias
        ``(S * outputs,)``, or None.
    """

    def __init__(
        self, replicas: int, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        for name, value in (("replicas", replicas), ("inputs", inputs), ("outputs", outputs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.weight = nn.Parameter(gain / inputs**0.5 * torch.randn(replicas, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(replicas * outputs)) if bias else None

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        replicas, inputs, outputs = self.weight.shape
        return f"{replicas} x ({inputs} -> {outputs}), bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Each replica's ``W u + b``.

        Parameters
        ----------
        x
            ``(m, S * inputs)``.

        Returns
        -------
        Tensor
            ``(m, S * outputs)``.

        Raises
        ------
        ValueError
            If ``x`` has another shape.
        """
        replicas, inputs, _ = self.weight.shape
        if x.ndim != 2 or x.shape[1] != replicas * inputs:
            raise ValueError(
                f"x must have shape (m, {replicas} * {inputs}), got {tuple(x.shape)}; "
                "put nn.Flatten() before a linear layer that follows a convolution"
            )
        u = x.view(len(x), replicas, inputs).transpose(0, 1)
        y = torch.bmm(u, self.weight).transpose(0, 1).reshape(len(x), -1)
        return y if self.bias is None else y + self.bias


def stacked_perceptron(
    replicas: int,
    sizes: Sequence[int],
    block: Callable[[int], Iterable[nn.Module]],
    *,
    bias: bool = False,
    gain: float = 1.0,
) -> nn.Sequential:
    """Fully connected networks side by side: linear layer, block, linear layer, block, ..., linear.

    Parameters
    ----------
    replicas
        How many networks, ``S``.
    sizes
        Inputs, hidden units of each layer, classes: ``(196, 100, 100, 10)``.
    block
        Called with the number of channels of each hidden layer (units times ``S``); returns what
        follows the linear layer there, as ``lambda n: [BatchNorm(n), nn.ReLU()]``.
    bias
        Whether the hidden linear layers have a bias. The last one always has.
    gain
        As in :class:`StackedLinear`.

    Returns
    -------
    torch.nn.Sequential
        Maps ``(m, S * inputs)`` to logits ``(m, S * classes)``.

    Raises
    ------
    ValueError
        If ``sizes`` names no hidden layer.
    """
    if len(sizes) < 3:
        raise ValueError(
            f"sizes must name the inputs, at least one hidden layer and the classes; got {sizes}"
        )
    layers: list[nn.Module] = []
    for inputs, units in pairwise(sizes[:-1]):
        layers.append(StackedLinear(replicas, inputs, units, bias=bias, gain=gain))
        layers.extend(block(replicas * units))
    layers.append(StackedLinear(replicas, sizes[-2], sizes[-1], gain=gain))
    return nn.Sequential(*layers)


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float | Sequence[float],
) -> Tensor:
    """Plain stochastic gradient descent on each replica's mean cross-entropy, in place.

    Parameters
    ----------
    model
        Maps ``(m, S * inputs)`` to ``(m, S * classes)``. The leading axis of each of its parameters
        counts channels, or replicas. It is left in training mode.
    batches
        Yields ``x`` of shape ``(S, m, inputs)`` and labels ``(S, m)``, as
        :func:`bnlib.mnist.mini_batches` does.
    steps
        Steps to take.
    learning_rate
        One for all, or one for each replica.

    Returns
    -------
    Tensor
        ``(steps, S)``: the loss in nats before each step; NaN from the first step at which it was
        not finite.

    Notes
    -----
    A replica that diverges does not disturb the others. When training ends, all its parameters
    and statistics are set to zero: it then answers at chance.
    """
    model.train()
    losses = []
    parameters = list(model.parameters())
    for _ in range(steps):
        x, labels = next(batches)
        replicas, m = labels.shape
        logits = model(x.transpose(0, 1).reshape(m, -1)).view(m, replicas, -1)
        loss = nn.functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
        loss = loss.mean(1)
        rate = torch.as_tensor(learning_rate, dtype=logits.dtype).expand(replicas)
        # The sum's gradient with respect to one replica's parameters is that of its own loss.
        gradients = torch.autograd.grad(loss.sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                gradient = gradient.contiguous().view(replicas, -1)
                parameter.sub_((rate[:, None] * gradient).view(parameter.shape))
        losses.append(loss.detach())
    history = torch.stack(losses)
    history[(~history.isfinite()).cumsum(0) > 0] = torch.nan
    _zero_diverged(model, ~history[-1].isfinite())
    return history


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
def predict(model: nn.Module, images: Tensor, replicas: int, *, chunk: int = 1000) -> Tensor:
    """Every replica's logits for the same images, in evaluation mode.

    Parameters
    ----------
    model
        As for :func:`train`. Its mode is left as it was.
    images
        ``(N, inputs)``.
    replicas
        ``S``.
    chunk
        Images to pass at once.

    Returns
    -------
    Tensor
        ``(S, N, classes)``.
    """
    training = model.training
    model.eval()
    logits = [
        model(part.repeat(1, replicas)).view(len(part), replicas, -1)
        for part in images.split(chunk)
    ]
    model.train(training)
    return torch.cat(logits).transpose(0, 1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, replicas: int) -> Tensor:
    """Every replica's fraction of correctly classified images, ``(S,)``; see :func:`predict`."""
    return (predict(model, images, replicas).argmax(2) == labels).float().mean(1)
