"""Ghost batches: parts of a mini-batch normalized by themselves."""

import pytest
import torch
from torch import Tensor

from bnlib import BatchNorm
from bnlib.modules import GhostBatchNorm


def examples() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64) + 1


def test_a_ghost_batch_is_normalized_by_itself() -> None:
    x = examples()
    layer, plain = GhostBatchNorm(2, 4).double(), BatchNorm(2).double()
    for each in (layer, plain):
        with torch.no_grad():
            each.weight.copy_(torch.tensor([0.5, 2.0]))
            each.bias.copy_(torch.tensor([1.0, -1.0]))
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(plain(x), expected)


def test_ghost_batches_keep_the_statistics_of_the_whole_and_infer_as_batch_norm() -> None:
    x = examples()
    layer, plain = GhostBatchNorm(2, 3).double(), BatchNorm(2).double()
    layer(x), plain(x)
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert torch.equal(layer.running_var, plain.running_var)
    assert int(layer.num_batches_tracked) == 1
    layer.eval(), plain.eval()
    assert torch.equal(layer(x[:5]), plain(x[:5]))


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 5), (12, 3, 2, 2), (12, 3, 2, 2, 2)])
def test_ghost_batches_take_every_shape_and_have_a_right_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = GhostBatchNorm(3, 4).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    parts = x.detach().requires_grad_()
    plain = BatchNorm(3).double()
    y = torch.cat([plain(part) for part in parts.split(4)])
    (y * upstream).sum().backward()
    torch.testing.assert_close(x.grad, parts.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_parts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="size is 1"):
        GhostBatchNorm(3, 1)
    with pytest.raises(ValueError, match="10 examples cannot be cut into parts of 4"):
        GhostBatchNorm(3, 4)(torch.randn(10, 3))
    assert "size=4" in repr(GhostBatchNorm(3, 4))
