"""Many small sigmoid networks trained at once: the machinery below the MNIST experiment.

Speed is this file's purpose. ``S`` networks of one shape, the *replicas*, live in tensors with a
leading axis of size ``S``, so that a training step is a handful of batched matrix products whatever
``S`` is. The gradient is written out, layer by layer, as the paper derives it, and two things are
folded away:

* Backpropagation is linear in the gradient at the top, so each replica's ``-learning_rate`` enters
  there once, and every gradient below arrives as the *step* to be added;
* the step of a weight matrix is added by the very product that computes it (``baddbmm_``).

The tests hold it against the plain loop with ``torch.nn`` and autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class Layer:
    """One hidden layer of all replicas, and what its backward pass needs of the forward pass."""

    weight: Tensor  # (S, inputs, units)
    gamma: Tensor  # (S, 1, units); unused without normalization
    beta: Tensor  # (S, 1, units); the bias b when there is no normalization
    mean: Tensor  # E[x], (S, 1, units): Algorithm 2, line 10
    var: Tensor  # Var[x], (S, 1, units)
    z: Tensor = field(init=False, repr=False)  # W u, then x_hat in place, (S, m, units)
    y: Tensor = field(init=False, repr=False)  # the sigmoid's input, then its output, in place
    inv_std: Tensor = field(init=False, repr=False)


class Replicas:
    """``S`` fully connected sigmoid networks with a softmax on top.

    Parameters
    ----------
    seeds
        One per replica; seeds its weights.
    weight_std
        One per replica: the standard deviation of the Gaussian its weights are drawn from.
        Biases and beta start at 0, gamma at 1.
    sizes
        Inputs, hidden units of each layer, classes: ``(784, 100, 100, 100, 10)``.
    normalize
        Whether each hidden layer computes ``sigmoid(BN(W u))`` or ``sigmoid(W u + b)``.
    eps
        Added to the variance.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        weight_std: Sequence[float],
        sizes: Sequence[int],
        *,
        normalize: bool,
        eps: float = 1e-5,
    ) -> None:
        self.normalize, self.eps, self.size = normalize, eps, len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        weights = []
        for inputs, units in pairwise(sizes):
            drawn = [
                std * torch.randn(inputs, units, generator=generator)
                for std, generator in zip(weight_std, generators, strict=True)
            ]
            weights.append(torch.stack(drawn))

        def row(units: int, value: float) -> Tensor:
            return torch.full((self.size, 1, units), value)

        self.hidden = [
            Layer(weight, row(n, 1.0), row(n, 0.0), row(n, 0.0), row(n, 1.0))
            for weight, n in zip(weights[:-1], sizes[1:-1], strict=True)
        ]
        self.top_weight, self.top_bias = weights[-1], row(sizes[-1], 0.0)

    def step(self, x: Tensor, labels: Tensor, learning_rate: Tensor) -> Tensor:
        """One step of stochastic gradient descent on the mean cross-entropy, in place.

        Parameters
        ----------
        x
            float32, ``(S, m, inputs)``: each replica's own mini-batch.
        labels
            int64, ``(S, m)``.
        learning_rate
            float32, ``(S, 1, 1)``.

        Returns
        -------
        Tensor
            The mean loss of each replica before the step, ``(S,)``.
        """
        m = x.shape[1]
        u = x
        for layer in self.hidden:
            u = self._forward_training(layer, u)
        log_p = torch.baddbmm(self.top_bias, u, self.top_weight).log_softmax(2)
        target = labels.unsqueeze(2)
        loss = -log_p.gather(2, target).mean((1, 2))

        # d loss / d logits = (p - one_hot) / m; times -learning_rate it is the step.
        step = log_p.exp_().scatter_add_(2, target, torch.full_like(log_p[:, :, :1], -1.0))
        step *= learning_rate / -m
        below = torch.bmm(step, self.top_weight.mT)
        self.top_weight.baddbmm_(u.mT, step)
        self.top_bias += step.sum(1, keepdim=True)
        for index in reversed(range(len(self.hidden))):
            layer = self.hidden[index]
            u = self.hidden[index - 1].y if index else x
            step = self._backward(layer, below)
            if index:
                below = torch.bmm(step, layer.weight.mT)
            layer.weight.baddbmm_(u.mT, step)
        return loss

    def _forward_training(self, layer: Layer, u: Tensor) -> Tensor:
        if not self.normalize:
            layer.y = torch.baddbmm(layer.beta, u, layer.weight).sigmoid_()
            return layer.y
        z, _, var = _center(torch.bmm(u, layer.weight))
        layer.inv_std = var.add_(self.eps).rsqrt_()
        layer.z = z.mul_(layer.inv_std)
        layer.y = torch.addcmul(layer.beta, layer.z, layer.gamma).sigmoid_()
        return layer.y

    def _backward(self, layer: Layer, grad: Tensor) -> Tensor:
        """From the gradient of the sigmoid's output to that of W u, stepping gamma and beta."""
        grad_y = torch.ops.aten.sigmoid_backward(grad, layer.y)
        if not self.normalize:
            layer.beta += grad_y.sum(1, keepdim=True)
            return grad_y
        m = grad_y.shape[1]
        grad_beta = grad_y.sum(1, keepdim=True)
        grad_gamma = (grad_y * layer.z).sum(1, keepdim=True)
        scale = layer.gamma * layer.inv_std
        # gamma / sqrt(var + eps) * (g - sum(g) / m - x_hat * sum(g x_hat) / m)
        grad_z = grad_y.sub_(grad_beta / m).addcmul_(layer.z, grad_gamma / -m).mul_(scale)
        layer.gamma += grad_gamma
        layer.beta += grad_beta
        return grad_z

    def estimate_population(self, batches: Iterable[Tensor]) -> None:
        """Algorithm 2, lines 7 to 10: set every layer's E[x] and Var[x] from training batches.

        Parameters
        ----------
        batches
            Tensors ``(S, m, inputs)``, all of one size ``m > 1``.
        """
        if not self.normalize:
            return
        sums = [(torch.zeros_like(la.mean), torch.zeros_like(la.var)) for la in self.hidden]
        count = 0
        for u in batches:
            count += 1
            for layer, (mean_sum, var_sum) in zip(self.hidden, sums, strict=True):
                z, mean, var = _center(torch.bmm(u, layer.weight))
                m = z.shape[1]
                mean_sum += mean
                var_sum += var * (m / (m - 1))
                z *= var.add_(self.eps).rsqrt_()
                u = torch.addcmul(layer.beta, z, layer.gamma).sigmoid_()
        for layer, (mean_sum, var_sum) in zip(self.hidden, sums, strict=True):
            layer.mean, layer.var = mean_sum / count, var_sum / count

    def infer(self, x: Tensor, *, batch_statistics: bool = False) -> tuple[Tensor, Tensor]:
        """The frozen networks of Algorithm 2, line 11, on any number of inputs.

        Parameters
        ----------
        x
            float32, ``(n, inputs)``, the same for all replicas, or ``(S, n, inputs)``.
        batch_statistics
            Normalize with the statistics of ``x`` itself instead of the population's.

        Returns
        -------
        logits, sigmoid_inputs
            ``(S, n, classes)`` and, for the last hidden layer, ``(S, n, units)``.
        """
        u = x if x.ndim == 3 else x.expand(self.size, *x.shape)
        z = u
        for layer in self.hidden:
            z = torch.bmm(u, layer.weight)
            if self.normalize:
                if batch_statistics:
                    z, _, var = _center(z)
                else:
                    z, var = z.sub_(layer.mean), layer.var
                scale = layer.gamma * (var + self.eps).rsqrt()
                z = torch.addcmul(layer.beta, z, scale)
            else:
                z = z.add_(layer.beta)
            u = z.sigmoid()
        return torch.baddbmm(self.top_bias, u, self.top_weight), z


def _center(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract each unit's mini-batch mean in place: ``(z - mean, mean, biased variance)``.

    Two passes, as Algorithm 1 is written, which is several times faster here than ``var_mean``
    over an inner axis.
    """
    mean = z.mean(1, keepdim=True)
    z -= mean
    return z, mean, z.square().mean(1, keepdim=True)
