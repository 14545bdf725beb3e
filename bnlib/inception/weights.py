"""The published weights of BN-Inception: the pretrainedmodels port's state dicts, read and written.

The port (pretrainedmodels 0.7.4, ``bninception``) carries the Caffe weights that most users of
BN-Inception have, in files such as ``bn_inception-52deb4733.pth``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.inception.architecture import SMALLEST, BNInception
from bnlib.inception.state_files import EXPECTED, first_few, open_state_dict

__all__ = ["cadene_transform", "load_cadene", "to_cadene"]

# The port's names of our layers.  A layer's key is the port's name of the stem's layer, or
# inception_<module>_<branch>; the key of its normalization has _bn after it.
STEM = {"conv1": "conv1_7x7_s2", "conv2_reduce": "conv2_3x3_reduce", "conv2": "conv2_3x3"}
BRANCHES = {
    "conv1x1": "1x1",
    "reduce3x3": "3x3_reduce",
    "conv3x3": "3x3",
    "reduce_double3x3": "double_3x3_reduce",
    "double3x3_1": "double_3x3_1",
    "double3x3_2": "double_3x3_2",
    "projection": "pool_proj",
}
PARTS = {"conv": "", "norm": "_bn"}

# All other options are fixed by the weights.
FREE_OPTIONS = ("conv_bias", "dropout", "features_only", "global_pool", "num_classes")

NETWORKS = {  # by a key that only this network has
    "inception.3a.conv1x1.conv.weight": "this library's own; use BNInception(...).load_state_dict",
    "layer1.0.conv1.weight": "torchvision's resnet",
    "inception3a.branch1.conv.weight": "torchvision's googlenet",
    "Mixed_5b.branch1x1.conv.weight": "torchvision's inception_v3",
    "features.denseblock1.denselayer1.conv1.weight": "torchvision's densenet",
    "features.0.weight": "torchvision's vgg or alexnet",
    "conv1_7x7_s2.weight": "the port's or a descendant's, with layers changed",
}


def load_cadene(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], **options: Any
) -> BNInception:
    """BN-Inception with weights in the layout of the pretrainedmodels port.

    The network computes what the port computes, in evaluation and in training, on every image size
    that the port takes.  It expects the port's input: see :func:`cadene_transform`.

    Parameters
    ----------
    path_or_state_dict
        A file, as ``torch.save`` writes it, or the state dict itself.  It may be nested under
        "state_dict", and its keys may begin with "module.", as DataParallel leaves them.  Vectors
        of shape (1, C), as files of the first PyTorch versions have, count as (C,).
        ``num_batches_tracked`` may be missing.
    **options
        ``dropout``, ``features_only`` and ``global_pool`` of
        :class:`~bnlib.inception.architecture.BNInception`.
        ``num_classes=0`` leaves out the classifier, whether or not the file has one; otherwise the
        number of classes is the file's.  ``conv_bias=False`` subtracts the convolutions' biases
        from the running means and drops them: the same function, in training too, with 10,016
        parameters fewer.

    Returns
    -------
    BNInception
        In evaluation mode, with copies of the tensors, in their dtype, on their device; those of a
        file are on the CPU.  Random numbers are not drawn.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If an option is unknown or fixed by the weights, or the argument is neither a path nor a
        mapping.
    ValueError
        If the file is not a checkpoint, is cut off, holds more than tensors (nothing in it is ever
        executed), or belongs to another network; the message says what it looks like.
    """
    if fixed := sorted(options.keys() - set(FREE_OPTIONS)):
        raise TypeError(f"options {fixed}: these weights leave only {list(FREE_OPTIONS)} open")
    found, name = open_state_dict(path_or_state_dict)

    weight = found.get("last_linear.weight")
    classes = len(weight) if weight is not None and weight.ndim == 2 else 1000
    if options.get("num_classes", classes) not in (0, classes):
        raise ValueError(
            f"num_classes is {options['num_classes']}, but {name} has {classes} classes. For "
            "others, load it and put a new torch.nn.Linear(model.num_features, classes) at model.fc"
        )
    if options.get("num_classes") == 0 or options.get("features_only"):
        options["num_classes"] = 0
        found = {key: v for key, v in found.items() if not key.startswith("last_linear.")}
    else:
        options["num_classes"] = classes
    first = found.get("conv1_7x7_s2.weight")
    in_chans = first.shape[1] if first is not None and first.ndim == 4 else 3
    keep_bias = options.pop("conv_bias", True)

    model = _skeleton(in_chans, conv_bias=True, **options)
    state = _matched(model, found, name)
    if not keep_bias:
        model = _skeleton(in_chans, conv_bias=False, **options)
        for mean in [key for key in state if key.endswith("norm.running_mean")]:
            state[mean] -= state.pop(mean.replace("norm.running_mean", "conv.bias"))
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_cadene(model: BNInception) -> dict[str, Tensor]:
    """The weights of a network in the layout of the pretrainedmodels port; the inverse of loading.

    Parameters
    ----------
    model
        Made with ``pool_proj_4cd=128``, and otherwise as the port: width 1, plain stem, batch
        normalization, ReLU, no local response normalization, average pooling, a classifier.
        Convolutions without bias get biases of zero, which does not change the function.

    Returns
    -------
    dict of str to torch.Tensor
        Copies, for ``load_state_dict`` of the port or for ``torch.save``.

    Raises
    ------
    TypeError, ValueError
        If the port cannot compute what this network does; the message says where it differs.
    """
    if not isinstance(model, BNInception):
        raise TypeError(f"got a {type(model).__name__}; only a BNInception has the port's layers")
    state = dict(model.state_dict())
    classes = model.fc.out_features if isinstance(model.fc, nn.Linear) else 1000
    like = _skeleton(model.images.channels, num_classes=classes, conv_bias=True)
    expected = like.state_dict()
    for key, value in expected.items():
        if key.endswith("conv.bias") and key not in state:
            state[key] = torch.zeros(value.shape).to(next(model.parameters()))
    differences = _differences(expected, state)
    for kind in (nn.Sigmoid, nn.LocalResponseNorm, nn.AdaptiveMaxPool2d):
        if any(isinstance(module, kind) for module in model.modules()):
            differences.append(f"  layers: it has {kind.__name__}, the port has not")
    eps = {module.eps for module in model.modules() if isinstance(module, _BatchNorm)} - {1e-5}
    if eps:
        differences.append(f"  eps: {sorted(eps)}, the port has 1e-05")
    if differences:
        raise ValueError(
            "the port cannot compute what this network does:\n" + "\n".join(differences) + "\n"
            "A network that it can is bn_inception(pool_proj_4cd=128), not yet folded"
        )
    return {_their_key(key): value.detach().clone() for key, value in state.items()}


def cadene_transform(resize: int = 256, size: int = 224) -> Callable[[Any], Tensor]:
    """The port's preparation of images, for networks from :func:`load_cadene`.

    Shorter side to ``resize`` pixels, bilinear; the square of ``size`` pixels, from 32 to
    ``resize``, in the center; channels blue, green, red; values 0 to 255, less the means 104, 117
    and 128; no division by a deviation.

    Returns
    -------
    callable
        From a PIL image, of any mode, to a float32 tensor (3, size, size).  It can be pickled, as
        the workers of a DataLoader need.

    Raises
    ------
    ImportError
        If torchvision is missing.
    ValueError
        If ``size`` is out of range.
    """
    if not SMALLEST <= size <= resize:
        raise ValueError(
            f"size is {size} and resize {resize}; size must be from {SMALLEST}, the smallest image "
            "that the network takes, to resize"
        )
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            "cadene_transform needs torchvision, the rest of bnlib does not; install it with "
            "pip install torchvision"
        ) from error
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(resize),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            functools.partial(torch.flip, dims=[0]),
            v2.Normalize([104.0, 117.0, 128.0], [1.0, 1.0, 1.0]),
        ]
    )


def _skeleton(in_chans: int, **options: Any) -> BNInception:
    """The port's network without memory for its tensors."""
    with torch.device("meta"):
        return BNInception(in_chans=in_chans, pool_proj_4cd=128, eps=1e-5, **options)


def _their_key(ours: str) -> str:
    """The port's name for a key of our state dict."""
    *path, tensor = ours.split(".")
    if path == ["fc"]:
        return f"last_linear.{tensor}"
    *layer, part = path
    name = f"inception_{layer[1]}_{BRANCHES[layer[2]]}" if len(layer) > 1 else STEM[layer[0]]
    return f"{name}{PARTS[part]}.{tensor}"


def _matched(model: BNInception, found: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Copies of the tensors under our names, after every name and shape has been compared."""
    expected = {_their_key(key): value for key, value in model.state_dict().items()}
    found = dict(found)
    for theirs, like in expected.items():
        if theirs.endswith(".num_batches_tracked"):
            found.setdefault(theirs, torch.tensor(0))
        elif theirs in found and found[theirs].shape == (1, *like.shape) and like.ndim == 1:
            found[theirs] = found[theirs][0]
    if differences := _differences(expected, found):
        looks = next((network for key, network in NETWORKS.items() if key in found), None)
        if nested := [key for key in found if key.endswith(".conv1_7x7_s2.weight")]:
            prefix = nested[0].removesuffix("conv1_7x7_s2.weight")
            looks = f"the port's with {prefix!r} before each key; remove that"
        raise ValueError(
            f"{name} does not fit; expected {EXPECTED}:\n"
            + "\n".join(differences)
            + (f"\nIts keys look like {looks}" if looks else "")
        )
    return {key: found[_their_key(key)].clone() for key in model.state_dict()}


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Why ``found`` cannot take the place of ``expected``: one line for each kind of difference."""
    both = expected.keys() & found.keys()
    kinds = {
        "missing": [key for key in expected if key not in both],
        "unexpected": [key for key in found if key not in both],
        "of another kind": [
            f"{key} ({found[key].dtype}, shape {list(found[key].shape)}, not {list(like.shape)})"
            for key, like in expected.items()
            if key in both
            and (like.shape, like.is_floating_point())
            != (found[key].shape, found[key].is_floating_point())
        ],
    }
    return [f"  {kind}: {first_few(keys)}" for kind, keys in kinds.items() if keys]
