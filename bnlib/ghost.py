"""Ghost batches: the parts of a mini-batch that are normalized each by itself.

The name is from Hoffer et al. (2017), who cut very large mini-batches so.  It is also what many
processes do that train one network together, each with its share of the mini-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnlib.functional import batch_norm
from bnlib.modules import BatchNorm

__all__ = ["GhostBatchNorm"]


class GhostBatchNorm(BatchNorm):
    """Batch normalization with the statistics of parts of the mini-batch.

    The running statistics are those of whole mini-batches, and inference is that of
    :class:`~bnlib.modules.BatchNorm`.

    Parameters
    ----------
    num_features
        Number of channels C.
    size
        Examples of a part, 2 or more: the first ``size`` examples are one, the next ones another.
    eps, momentum
        As in :class:`~bnlib.modules.BatchNorm`.

    Raises
    ------
    ValueError
        If ``size`` is less than 2, and as :class:`~bnlib.modules.BatchNorm` does.
    """

    def __init__(
        self, num_features: int, size: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        if size < 2:
            raise ValueError(f"size is {size}; a part needs 2 examples or more to have a variance")
        self.size = size

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        return f"{super().extra_repr()}, size={self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each part of a mini-batch by itself.

        Parameters
        ----------
        x
            Tensor of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).  In training N is a
            multiple of ``size``.

        Returns
        -------
        torch.Tensor
            A tensor of the shape and dtype of ``x``.

        Raises
        ------
        ValueError, TypeError
            In training, if N is no multiple of ``size``; and as :class:`~bnlib.modules.BatchNorm`
            does.
        """
        if not self.training or len(x) == self.size:
            return super().forward(x)
        if len(x) % self.size:
            raise ValueError(
                f"a mini-batch of {len(x)} examples cannot be cut into parts of {self.size}; take "
                f"a multiple of {self.size} examples, or another size"
            )
        with torch.no_grad():
            super().forward(x)  # for the running statistics
        # (size, parts, C, ...): each part's channels become channels of their own
        parts = x.unflatten(0, (-1, self.size)).transpose(0, 1)
        gamma, beta = (p.repeat(parts.shape[1]) for p in (self.weight, self.bias))
        y = batch_norm(parts.flatten(1, 2), gamma, beta, self.eps)
        return y.view_as(parts).transpose(0, 1).reshape(x.shape)
