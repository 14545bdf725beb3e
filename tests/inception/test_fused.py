"""Fused normalization and ReLU, in Triton's interpreter: the kernels' own code, on the CPU.

Whether Triton interprets is settled when it is imported, so this file runs itself once more in a
process of its own with ``TRITON_INTERPRET=1``; the tests marked ``interpreted`` run there.
"""

from __future__ import annotations

import copy
import os
import re
import statistics
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlib import fold_batch_norm, population_statistics
from bnlib.functional import batch_norm_backward, batch_norm_forward
from bnlib.imagenet import recipe
from bnlib.imagenet.options import Settings
from bnlib.imagenet.training.loop import train
from bnlib.inception import bn_inception
from bnlib.inception.fused import BatchNormReLU, fuse_norm_relu, norm_relu
from bnlib.inception.modules import Convolutions, Inception
from bnlib.inception.table import repaired

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs in the interpreting process")

SHAPES = [
    (2, 1, 1, 1),  # m = 2, and no channel beside it
    (2, 3, 1, 1),
    (1, 5, 2, 1),
    (4, 24, 5, 7),
    (3, 64, 9, 11),
    (2, 96, 24, 25),  # several parts of several tiles
    (2, 33, 30, 31),
]


def example(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, nn.BatchNorm2d]:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    norm = nn.BatchNorm2d(shape[1], eps=1e-4, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
        norm.running_mean.fill_(1.5)
    x = (x * 2 + mean).to(dtype).to(memory_format=torch.channels_last)
    return x, grad.to(dtype).to(memory_format=torch.channels_last), norm


def results(x: Tensor, grad: Tensor, norm: nn.Module, fused: bool, **options: bool) -> list[Tensor]:
    """Output, derivatives and running statistics."""
    norm = copy.deepcopy(norm)
    x = x.detach().clone().requires_grad_()
    y = norm_relu(x, norm, **options) if fused else F.relu(norm(x))
    assert fused == (type(y.grad_fn).__name__ == "_NormReLUBackward")
    y.backward(grad)
    running = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *running]


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        largest = float(theirs.abs().max())
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=0, atol=tolerance * max(largest, 1e-2)
        )


@needs_triton
@pytest.mark.skipif(INTERPRETS, reason="this is the interpreting process")
def test_the_kernels_pass_their_tests_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not interpreter"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None
    assert int(passed[1]) > 30  # so they were not skipped


@interpreted
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_with_torch_in_float64(shape, one_launch):
    x, grad, norm = example(shape, torch.float32)
    exact = results(x.double(), grad.double(), norm.double(), fused=False)
    found = results(x, grad, norm.float(), fused=True, one_launch=one_launch)
    # two values leave x_hat at 1, and a gradient that is the rounding of a difference
    assert_near(found, exact, 3e-4 if x.numel() == 2 * x.shape[1] else 3e-6)


@interpreted
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, one_launch):
    x, grad, norm = example((4, 40, 12, 10), dtype)
    exact = results(x.double(), grad.double(), norm.double(), fused=False)
    found = results(x, grad, norm.float(), fused=True, one_launch=one_launch)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_near(found[:2], exact[:2], torch.finfo(dtype).eps)
    assert_near(found[2:], exact[2:], 3e-6)  # sums over the map are in float32


@interpreted
@pytest.mark.parametrize("one_launch", [False, True])
def test_a_mean_much_larger_than_the_deviation_costs_no_digits(one_launch):
    x, grad, norm = example((4, 32, 20, 20), torch.float32, mean=2e5)
    exact = results(x.double(), grad.double(), norm.double(), fused=False)
    found = results(x, grad, norm.float(), fused=True, one_launch=one_launch)
    assert_near(found, exact, 1e-5)


@interpreted
def test_a_first_value_far_from_the_others_costs_few_digits():
    x, grad, norm = example((4, 32, 20, 20), torch.float32)
    x[0, :, 0, 0] = 1e4
    exact = results(x.double(), grad.double(), norm.double(), fused=False)
    found = results(x, grad, norm.float(), fused=True, one_launch=False)
    assert_near(found, exact, 5e-4)


@interpreted
def test_the_derivative_is_the_closed_form():
    x, grad, norm = example((3, 20, 6, 5), torch.float32)
    y, grad_x, grad_gamma, grad_beta, *_ = results(x, grad, norm, fused=True)
    forward = batch_norm_forward(x.double(), norm.weight.double(), norm.bias.double(), norm.eps)
    upstream = torch.where(y > 0, grad, 0.0).double()
    wanted = batch_norm_backward(upstream, forward.x_hat, forward.inv_std, norm.weight.double())
    assert_near([grad_x, grad_gamma, grad_beta], [t.detach() for t in wanted], 3e-6)


@interpreted
def test_a_gradient_that_is_part_of_a_concatenation_is_read_in_place():
    x, _, norm = example((3, 16, 6, 5), torch.float32)
    whole = torch.randn(3, 40, 6, 5).to(memory_format=torch.channels_last)
    part = whole[:, 8:24]
    found = results(x, part, norm, fused=True)
    assert_near(found, results(x, part, norm, fused=False), 3e-6)
    rows = part.movedim(1, -1).flatten(0, -2)
    assert rows.data_ptr() == part.data_ptr()  # so a copy was not needed
    planes = part.contiguous()  # channels first: needs one
    assert_near(results(x, planes, norm, fused=True), found, 0)


@interpreted
@pytest.mark.parametrize("one_launch", [False, True])
def test_the_same_input_gives_the_same_bits(one_launch):
    x, grad, norm = example((2, 96, 24, 25), torch.bfloat16)
    first = results(x, grad, norm, fused=True, one_launch=one_launch)
    for found, wanted in zip(
        results(x, grad, norm, fused=True, one_launch=one_launch), first, strict=True
    ):
        assert torch.equal(found, wanted)


@interpreted
def test_nan_and_infinity_are_not_cut_off():
    x, grad, norm = example((2, 4, 3, 3), torch.float32)
    x[0, 1, 1, 1], x[1, 2, 0, 0] = float("nan"), float("inf")
    for one_launch in (False, True):
        y, grad_x, *_ = results(x, grad, norm, fused=True, one_launch=one_launch)
        assert y[:, 1:3].isnan().all()
        assert grad_x[:, 1:3].isnan().all()
        assert y[:, [0, 3]].isfinite().all()


@interpreted
def test_without_gradients_the_statistics_move_all_the_same():
    x, _, norm = example((2, 8, 4, 4), torch.float32)
    other = copy.deepcopy(norm)
    with torch.no_grad():
        assert_near([norm_relu(x, norm)], [F.relu(other(x))], 3e-6)
    assert_near([norm.running_var], [other.running_var], 3e-6)
    assert norm.num_batches_tracked == 1


@interpreted
@pytest.mark.parametrize(
    "change",
    [
        lambda x, norm: (x.contiguous(), norm),
        lambda x, norm: (x.double(), norm.double()),
        lambda x, norm: (x, norm.eval()),
        lambda x, norm: (x, nn.BatchNorm2d(8, momentum=None)),
        lambda x, norm: (x, nn.BatchNorm2d(8, affine=False)),
        lambda x, norm: (x, nn.BatchNorm2d(8, track_running_stats=False)),
    ],
)
def test_what_has_no_kernel_is_left_to_torch(change):
    x, _, norm = example((2, 8, 4, 4), torch.float32)
    x, norm = change(x, norm)
    y = norm_relu(x.requires_grad_(), copy.deepcopy(norm))
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    torch.testing.assert_close(y, F.relu(norm(x)), rtol=0, atol=0)


@interpreted
def test_a_single_value_in_each_channel_is_refused_as_torch_does():
    x = torch.ones(1, 8, 1, 1).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm_relu(x, nn.BatchNorm2d(8))


def test_the_layer_has_the_state_dict_of_torchs():
    ours, theirs = BatchNormReLU(6), nn.BatchNorm2d(6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, _, theirs = example((3, 6, 4, 4), torch.float32)
    ours.load_state_dict(theirs.state_dict())
    ours.eps, ours.momentum = theirs.eps, theirs.momentum
    for _ in range(2):
        torch.testing.assert_close(ours(x), F.relu(theirs(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), F.relu(theirs.eval()(x)), rtol=1e-5, atol=1e-5)


def gradients(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of the parameters; and the running statistics."""
    weights = torch.randn(net(images).shape, generator=torch.Generator().manual_seed(1))
    (net(images) * weights.to(images)).sum().backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {name: t.double() for name, t in (found | dict(net.named_buffers())).items()}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The median over the tensors, each as a share of its own length.

    Not the largest: where a value is as near to zero as rounding, ReLU decides by it, and a
    gradient is there or is not.
    """
    return statistics.median(float((found[n] - t).norm() / t.norm()) for n, t in exact.items())


@interpreted
@pytest.mark.parametrize("recompute", [False, True])
def test_a_network_is_as_near_to_the_exact_one_as_torchs(recompute):
    torch.manual_seed(0)
    conv = Convolutions("batch", "relu", False, 1e-5, recompute)
    rows = {row.type: row for row in repaired(96)}
    plain = nn.Sequential(Inception(rows["3b"], 12, conv), Inception(rows["3c"], 320, conv))
    plain = plain.to(memory_format=torch.channels_last)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert fuse_norm_relu(fused) == 7 + 5
    assert fused.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(4, 12, 16, 16).to(memory_format=torch.channels_last)
    wanted = gradients(exact, images.double())
    limit = error(gradients(plain, images), wanted)
    assert error(gradients(fused, images), wanted) <= 3 * limit
    assert limit < 1e-5


@interpreted
def test_the_whole_network_has_the_outputs_and_names_of_torchs():
    torch.manual_seed(0)
    plain = bn_inception(num_classes=5).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    assert fuse_norm_relu(fused) == 69
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # the last maps have four values a channel, which magnifies the rounding of all layers
        torch.testing.assert_close(fused(images), plain(images), rtol=1e-2, atol=2e-3)
    assert all(int(n) == 1 for name, n in fused.named_buffers() if name.endswith("tracked"))
    for name, wanted in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), wanted, rtol=1e-2, atol=2e-3)


@interpreted
def test_population_statistics_and_folding_see_the_same_network():
    torch.manual_seed(0)
    plain = bn_inception(num_classes=5).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fuse_norm_relu(fused)
    batches = [torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    for net in (plain, fused):
        population_statistics(net, batches)
    for name, wanted in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], wanted), name
    with torch.no_grad():
        found = fold_batch_norm(fused)(batches[0])
        torch.testing.assert_close(found, plain.eval()(batches[0]), rtol=1e-3, atol=1e-4)


@interpreted
def test_a_network_without_such_pairs_is_refused():
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse_norm_relu(bn_inception(num_classes=2, activation="sigmoid"))


@pytest.mark.skipif(INTERPRETS, reason="there the CPU has kernels")
def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"cannot be fused here: .*(CUDA device|not installed)"):
        fuse_norm_relu(bn_inception(num_classes=2))


@pytest.mark.skipif(INTERPRETS, reason="there the CPU has kernels")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "cannot be fused here"),
        ({"compile": True}, "compile"),
        ({"sync_bn": True}, "sync_bn"),
    ],
)
def test_the_trainer_refuses_what_it_cannot_fuse(settings, message, tmp_path):
    from test_data import write_folder

    data = write_folder(tmp_path / "data")
    small = recipe("bn-x5").replace(image_size=32, num_classes=3, batch_size=4, steps=2, shards=6)
    options = {"device": "cpu", "workers": 0, "tensorboard": False, "fused": True}
    with pytest.raises(ValueError, match=message):
        train(small, data, tmp_path / "out", Settings(**options, **settings))


# What the interpreter takes, the compiler may refuse; for a GPU it compiles without one.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bnlib.inception import _fused_kernels as kernels

blocks = {"BLOCK_R": 64, "BLOCK_C": 32, "BLOCK_P": 64, "TILES": 4}
halves = {"x_ptr", "y_ptr", "g_ptr", "out_ptr"}
for name in kernels.__all__:
    kernel = getattr(kernels, name)
    types, constants = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in blocks:
            types[argument], constants[(place,)] = "constexpr", blocks[argument]
        elif argument.endswith("_ptr"):
            types[argument] = "*bf16" if argument in halves else "*fp32"
        else:
            types[argument] = "fp32" if argument in ("momentum", "eps") else "i32"
    source = ASTSource(kernel, types, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    print(name)
"""


@needs_triton
@pytest.mark.skipif(INTERPRETS, reason="Triton compiles nothing in the interpreting process")
def test_the_kernels_compile_for_a_gpu(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(process.stdout.split()) == 8


@pytest.mark.skipif(INTERPRETS, reason="Triton is loaded in the interpreting process")
def test_importing_the_network_does_not_import_triton():
    code = "import sys, bnlib, bnlib.inception.fused; print('triton' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "False", process.stderr
