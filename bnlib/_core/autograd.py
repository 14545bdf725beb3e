"""``batch_norm`` for autograd and ``torch.func``: closed forms of first and second derivatives.

For one channel of m values, let s = 1 / sqrt(var + eps), c(z) = mean(z * x_hat), g = grad_y, and

    P z = z - mean(z) - c(z) x_hat,

which is symmetric and takes from z its mean and its share along x_hat.  Then

    d x_hat = s P dx,      d s = -s^2 c(dx),      grad_x = gamma s P g (the compact form).

For the second derivative, let v, a, b be upstream gradients of grad_x, grad_gamma, grad_beta, and
q = mean(v * P g).  Differentiating <v, grad_x> + a grad_gamma + b grad_beta gives

    with respect to g        gamma s P v + a x_hat + b
    with respect to gamma    m s q
    with respect to x        s (a P g - gamma s (c(g) P v + c(v) P g + q x_hat))

Everything a derivative keeps for its own derivative is an input, never an intermediate result: an
intermediate has no graph, and its share of the next derivative would silently be missing.  The
second derivative is made of plain tensor operations on inputs, so that all further ones follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function

from bnlib._core import kernels as _kernels
from bnlib._core.channels import batch_axes, center, count, per_channel, wide_dtype

__all__ = ["InferenceTransform", "TrainingTransform"]


def _fold(tensor: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """Under vmap: join the mapped axis to the channels, which batch norm treats independently."""
    if tensor is None:
        return None
    if dim is None:
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis:])
        return tensor.unsqueeze(axis).expand(shape).flatten(axis, axis + 1)
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


def _fold_all(
    tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], size: int, activations: int
) -> list[Tensor | None]:
    """``_fold`` for a Function's inputs: first the activations, then the per-channel vectors."""
    axes = [1] * activations + [0] * (len(tensors) - activations)
    return [_fold(t, d, size, a) for t, d, a in zip(tensors, dims, axes, strict=True)]


def _unfold(tensor: Tensor | None, size: int, axis: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.unflatten(axis, (size, tensor.shape[axis] // max(size, 1)))


class TrainingTransform(Function):
    """(x, gamma, beta, eps) -> (y, pivot, residual, var, inv_std); y alone has a derivative."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor | None, ...]:
        pivot, residual, var = _kernels.moments(x)
        inv_std = torch.rsqrt(var + eps)
        scale = gamma * inv_std
        return (
            _kernels.affine(x, pivot, scale, beta - residual * scale),
            pivot,
            residual,
            var,
            inv_std,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, gamma, _, ctx.eps = inputs
        _, pivot, residual, _, inv_std = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.save_for_backward(x, gamma, pivot, residual, inv_std)
        ctx.save_for_forward(x, gamma, pivot, residual, inv_std)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_TrainingDerivative.apply(grads[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None, _: None
    ) -> Any:
        x, gamma, pivot, residual, inv_std = ctx.saved_tensors
        dy = torch.zeros_like(x)
        if dx is not None:  # dy/dx is symmetric: its transpose will do
            dy = _TrainingDerivative.apply(dx, x, gamma, pivot, residual, inv_std, ctx.eps)[0]
        if dgamma is not None:
            x_hat = center(x)[0] * per_channel(inv_std, x)
            dy = dy + (x_hat * per_channel(dgamma, x)).to(x.dtype)
        if dbeta is not None:
            dy = dy + per_channel(dbeta, x).to(x.dtype)
        return dy, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        size = info.batch_size
        folded = _fold_all(inputs[:3], in_dims[:3], size, activations=1)
        y, *stats = TrainingTransform.apply(*folded, inputs[3])
        stats = [_unfold(t, size, 0) for t in stats]
        return (_unfold(y, size, 1), *stats), (1, *(None if t is None else 0 for t in stats))


class _TrainingDerivative(Function):
    """(grad_y, x, gamma, pivot, residual, inv_std, eps) -> gradients of x, gamma and beta."""

    @staticmethod
    def forward(
        grad_y: Tensor,
        x: Tensor,
        gamma: Tensor,
        pivot: Tensor | None,
        residual: Tensor,
        inv_std: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if is_legacy_batchedtensor(grad_y):  # ``is_grads_batched`` allows no writing into memory
            plain = _Second(x, gamma, grad_y, eps)
            grad_gamma = (plain.g * plain.x_hat).sum(plain.axes)
            return plain.compact(plain.g), grad_gamma, plain.g.sum(plain.axes)
        result = _kernels.gradients(grad_y, x, pivot, residual, inv_std, gamma)
        return result.x, result.gamma.to(gamma.dtype), result.beta.to(gamma.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_y, x, gamma, *_, ctx.eps = inputs
        ctx.save_for_backward(grad_y, x, gamma)
        ctx.save_for_forward(grad_y, x, gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, x, gamma = ctx.saved_tensors
        second = _Second(x, gamma, grad_y, ctx.eps)
        v, a, b = grads
        grad_of_x, grad_of_gamma = second.along(v, a)
        grad_of_g = second.compact(v) + per_channel(a, x) * second.x_hat + per_channel(b, x)
        return (
            grad_of_g.to(grad_y.dtype),
            grad_of_x.to(x.dtype),
            grad_of_gamma.to(gamma.dtype),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, dgamma: Tensor | None, *_: Any) -> Any:
        grad_y, x, gamma = ctx.saved_tensors
        second = _Second(x, gamma, grad_y, ctx.eps)
        dg = torch.zeros_like(grad_y) if dg is None else dg
        dx = torch.zeros_like(x) if dx is None else dx
        dgamma = torch.zeros_like(gamma) if dgamma is None else dgamma
        along_x, along_gamma = second.along(dx, dgamma)
        axes = batch_axes(x)
        return (
            (second.compact(dg) + along_x).to(x.dtype),
            ((dg * second.x_hat).sum(axes) + along_gamma).to(gamma.dtype),
            dg.to(second.x_hat.dtype).sum(axes).to(gamma.dtype),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        size = info.batch_size
        folded = _fold_all(inputs[:6], in_dims[:6], size, activations=2)
        grad_x, *vectors = _TrainingDerivative.apply(*folded, inputs[6])
        return (_unfold(grad_x, size, 1), *(_unfold(t, size, 0) for t in vectors)), (1, 0, 0)


class _Second:
    """The terms of the second derivative at the head of this file, for one x, gamma and g."""

    def __init__(self, x: Tensor, gamma: Tensor, grad_y: Tensor, eps: float) -> None:
        centered, _ = center(x)
        self.axes, self.m = batch_axes(x), count(x)
        self.s = per_channel(torch.rsqrt(centered.square().mean(self.axes) + eps), x)
        self.gamma = per_channel(gamma.to(centered.dtype), x)
        self.x_hat = centered * self.s
        self.g = grad_y.to(centered.dtype)

    def mean(self, z: Tensor) -> Tensor:
        return z.mean(self.axes, keepdim=True)

    def project(self, z: Tensor) -> Tensor:
        """P z."""
        return z - self.mean(z) - self.x_hat * self.mean(z * self.x_hat)

    def compact(self, z: Tensor) -> Tensor:
        """The compact form ``gamma s P z``: the derivative of y along z, and its transpose."""
        return self.gamma * self.s * self.project(z.to(self.g.dtype))

    def along(self, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The lines for x and for gamma; both are symmetric, so they serve either mode."""
        v = v.to(self.g.dtype)
        a = per_channel(a.to(self.g.dtype), v)
        pv, pg = self.project(v), self.project(self.g)
        cv, cg = self.mean(v * self.x_hat), self.mean(self.g * self.x_hat)
        q = self.mean(v * pg)
        along_x = self.s * (a * pg - self.gamma * self.s * (cg * pv + cv * pg + q * self.x_hat))
        return along_x, (self.m * self.s * q).reshape(-1)


class InferenceTransform(Function):
    """(x, mean, var, gamma, beta, eps) -> y: the fixed affine map of Algorithm 2, line 11."""

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> Tensor:
        scale = gamma * torch.rsqrt(var + eps)
        pivot, residual = _kernels.pivot(mean, var)
        return _kernels.affine(x, pivot, scale, beta - residual * scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.eps = inputs
        ctx.beta_dtype = inputs[4].dtype
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, gamma = ctx.saved_tensors
        g = grads[0].to(wide_dtype(x.dtype))
        inv_std = torch.rsqrt(var + ctx.eps)
        scale = gamma * inv_std
        needs_x, *needs_vectors, _ = ctx.needs_input_grad
        grad_x = (g * per_channel(scale, x)).to(x.dtype) if needs_x else None
        if not any(needs_vectors):
            return grad_x, None, None, None, None, None
        total = g.sum(batch_axes(x))
        product = (g * (x - per_channel(mean, x))).sum(batch_axes(x))
        return (
            grad_x,
            (-total * scale).to(mean.dtype),
            (product * scale * inv_std.square() * -0.5).to(var.dtype),
            (product * inv_std).to(gamma.dtype),
            total.to(ctx.beta_dtype),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, mean, var, gamma = ctx.saved_tensors
        given = (x, mean, var, gamma, gamma)
        dx, dmean, dvar, dgamma, dbeta = (
            torch.zeros_like(t) if d is None else d
            for t, d in zip(given, tangents[:5], strict=True)
        )
        inv_std = torch.rsqrt(var + ctx.eps)
        scale = gamma * inv_std
        dscale = dgamma * inv_std - scale * inv_std.square() * dvar / 2
        dy = (x - per_channel(mean, x)) * per_channel(dscale, x) + per_channel(dbeta, x)
        return (dy + (dx - per_channel(dmean, x)) * per_channel(scale, x)).to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor | None, int]:
        folded = _fold_all(inputs[:5], in_dims[:5], info.batch_size, activations=1)
        return _unfold(InferenceTransform.apply(*folded, inputs[5]), info.batch_size, 1), 1
