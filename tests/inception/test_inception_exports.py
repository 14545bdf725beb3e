"""The network in the rest of the library, and the ways out of PyTorch."""

import copy
import warnings

import pytest
import torch
from inception_networks import narrow, random_images
from normalization import settle
from torch import nn

import bnlib
from bnlib import fold_batch_norm


@pytest.mark.parametrize("options", [{}, {"stem": "separable"}, {"pool_proj_4cd": 128}])
def test_folding_keeps_the_outputs(options):
    model = settle(narrow(**options))
    folded = fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for size in ((64, 64), (65, 97)):
        x = random_images(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            assert expected.std() > 0
            torch.testing.assert_close(
                folded(x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item()
            )


def test_our_batch_norm_can_take_the_place_of_torchs(network):
    ours, theirs = copy.deepcopy(network), copy.deepcopy(network)
    exchanged = 0
    for parent in list(ours.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = bnlib.BatchNorm(child.num_features, eps=child.eps).double()
                setattr(parent, name, norm.train(child.training))
                exchanged += 1
    assert exchanged == 69
    ours.load_state_dict(theirs.state_dict())
    x = random_images(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for training in (False, True, False):
            found, expected = ours.train(training)(x), theirs.train(training)(x)
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * scale)
    for (name, p), q in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=name)


def test_channels_last_changes_nothing_but_the_layout(network):
    model = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x = random_images(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        found = model(x.contiguous(memory_format=torch.channels_last))
        expected = network(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


# The ways out


@pytest.mark.parametrize(
    ("options", "training"),
    [({}, True), ({"features_only": True}, False)],  # export, below, traces ({}, False)
)
def test_dynamo_follows_the_network_in_one_graph(options, training):
    torch._dynamo.reset()
    model = narrow(**options).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = random_images(2, 3, 71, 72)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        found = compiled(x)
    assert type(found) is type(expected)
    many = isinstance(found, (list, tuple))
    for a, b in zip(found if many else [found], expected if many else [expected], strict=True):
        torch.testing.assert_close(a, b)


def test_export_with_a_dynamic_batch(network):
    program = torch.export.export(
        network,
        (random_images(2, 3, 65, 64, dtype=torch.float64),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    for n in (2, 5):
        x = random_images(n, 3, 65, 64, dtype=torch.float64, seed=n)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), network(x), rtol=1e-10, atol=1e-10)


def test_onnx_runtime_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = settle(narrow()).float()
    path = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model,
            (random_images(2, 3, 65, 64),),
            path,
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    path.unlink()  # it is large
    for n in (1, 3):
        x = random_images(n, 3, 65, 64, seed=n)
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        scale = expected.abs().max().item()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="TorchScript is gone")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"features_only": True}])
def test_torchscript_compiles_the_network(options):
    model = settle(narrow(**options))
    scripted = torch.jit.script(model)
    for training, size in ((False, 71), (False, 72), (True, 72)):
        x = random_images(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            # Training moves the running statistics, which the scripted network shares.
            found, expected = scripted.train(training)(x), model.train(training)(x)
        many = not isinstance(expected, torch.Tensor)
        assert many == ("features_only" in options)
        for a, b in zip(found if many else [found], expected if many else [expected], strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * scale)
