"""BN-Inception: the network that the table of Figure 5 describes."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from bnlib.inception.layers import (
    ACTIVATIONS,
    Convolutions,
    ImageInput,
    Inception,
    LocalResponseNorm,
)
from bnlib.inception.table import FIGURE5, repaired, scaled

__all__ = ["BNInception", "bn_inception"]

SMALLEST = 32  # height and width of an image
POOLS = {"avg": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d, "none": nn.Identity}
CHOICES = {
    "pool_proj_4cd": (96, 128),
    "stem": ("plain", "separable"),
    "stem_stride": (8, 4),
    "normalization": ("batch", "none", "per-activation-last"),
    "activation": tuple(ACTIVATIONS),
    "global_pool": tuple(POOLS),
}


class BNInception(nn.Module):
    """BN-Inception, the network of section 4.2 and Figure 5.

    Parameters
    ----------
    num_classes
        Classes; 0 leaves out the classifier, so that the output is the pooled features.
    in_chans
        Channels of the images.
    pool_proj_4cd
        Pool projection of modules 4c and 4d.  With 96 channels add up to the 576 and 1024 that
        Figure 5 states.  128 is what the figure prints in that column, gives 608 and 1056, and is
        what the published Caffe, MXNet and PyTorch weights have.
    width
        Factor on every channel count of Figure 5 (not on ``in_chans`` or ``num_classes``), each
        rounded to the nearest multiple of 4 and at least 8.  1 is the paper's network.
    stem
        First convolution: "plain", a full 7x7, or "separable", the paper's, with a depth multiplier
        of 8.
    stem_stride
        8, the paper's; 4 leaves out the first max pooling, for small images: every later map is
        twice as high and wide.
    normalization
        "batch"; "none", the paper's Inception; "per-activation-last", the paper's option for some
        networks of the ensemble (section 4.2.3), here in module 5b: the paper says only "the last
        hidden layers".
    activation
        "relu" or "sigmoid".
    lrn
        Whether the stem has GoogLeNet's two local response normalizations, which batch
        normalization makes superfluous (section 4.2.1).
    dropout
        Probability, from 0 to below 1, that a feature is dropped before the classifier.
    conv_bias
        Whether convolutions have a bias.  None: only where no normalization follows, because
        normalization removes it (section 3.2).
    global_pool
        "avg", the paper's; "max"; or "none", which with ``num_classes=0`` returns the last map.
    features_only
        Whether the output is the list of maps at strides 2, 4, 8, 16 and 32, without a classifier.
    image_size
        Height and width of the images, which only "per-activation-last" needs: other networks take
        any size of 32 or more.
    eps
        Added to the variances by batch normalization.
    init_scale
        Factor on the initial weights of all convolutions (section 4.2.3: "larger" in some networks
        of the ensemble).

    Raises
    ------
    ValueError
        If an option is unknown or out of range, or options contradict each other.

    Notes
    -----
    Input (N, in_chans, H, W), floating-point.  Output (N, num_classes) logits.

    Initialization, which the paper does not state: convolutions normal with variance 2 / fan-in for
    ReLU (He et al., 2015) and 1 / fan-in for sigmoid, the classifier normal with deviation 0.01,
    biases 0, gamma 1, beta 0.

    Normalization is ``torch.nn.BatchNorm2d``, which has fused kernels on every device and exports
    everywhere; :class:`~bnlib.modules.BatchNorm` computes the same and can replace it.
    """

    __constants__ = ("features_only",)  # so that TorchScript compiles one branch only

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        pool_proj_4cd: int = 96,
        width: float = 1.0,
        stem: str = "plain",
        stem_stride: int = 8,
        normalization: str = "batch",
        activation: str = "relu",
        lrn: bool = False,
        dropout: float = 0.0,
        conv_bias: bool | None = None,
        global_pool: str = "avg",
        features_only: bool = False,
        image_size: int | tuple[int, int] = 224,
        eps: float = 1e-5,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_options(locals())
        last_map = _last_map_size(image_size, stem_stride)
        bias = normalization == "none" if conv_bias is None else conv_bias
        conv = Convolutions(normalization != "none", activation, bias, eps)
        last_conv = conv
        if normalization == "per-activation-last":
            last_conv = dataclasses.replace(conv, per_activation=last_map)
        self.features_only = features_only
        self.num_classes = num_classes
        self.activation = activation
        self.init_scale = init_scale

        first, second = scaled(FIGURE5[0], width), scaled(FIGURE5[2], width)
        channels = first.output[1]
        self.images = ImageInput(in_chans, SMALLEST)
        multiplier = 8 if stem == "separable" else 0
        self.conv1 = conv(in_chans, channels, first.patch, first.stride, multiplier)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True) if stem_stride == 8 else nn.Identity()
        self.lrn1 = LocalResponseNorm(5, 1e-4, 0.75) if lrn else nn.Identity()
        self.conv2_reduce = conv(channels, second.reduce3x3, 1)
        self.conv2 = conv(second.reduce3x3, second.conv3x3, second.patch)
        self.lrn2 = LocalResponseNorm(5, 1e-4, 0.75) if lrn else nn.Identity()
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)

        channels = second.conv3x3
        self.inception = nn.ModuleDict()
        for row in repaired(pool_proj_4cd, width):
            own_conv = last_conv if row.type == "5b" else conv
            self.inception[row.type] = Inception(row, channels, own_conv)
            channels = row.output[1]

        self.num_features = channels
        self.global_pool: nn.Module = nn.Identity()
        if global_pool != "none" and not features_only:
            self.global_pool = nn.Sequential(POOLS[global_pool](1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.fc: nn.Module = nn.Identity()
        if num_classes and not features_only:
            self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of convolutions and classifier anew, as the class states; biases 0."""
        gain = 2.0 if self.activation == "relu" else 1.0
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(std=self.init_scale * (gain / fan_in) ** 0.5)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.zero_()

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The maps after conv1, conv2, 3b, 4d and 5b: at strides 2, 4, 8, 16 and 32.

        From images (N, in_chans, H, W) to (N, 64, H/2, W/2), (N, 192, H/4, W/4),
        (N, 320, H/8, W/8), (N, 576, H/16, W/16) and (N, 1024, H/32, W/32); 608 in the place of 576
        with ``pool_proj_4cd=128``; scaled by ``width``.  The stem's poolings (strides 4 and 8)
        round an odd size down, all else rounds it up.  With ``stem_stride=4`` the strides are 2, 2,
        4, 8 and 16.
        """
        stride2, stride4 = self._stem(x)
        return [stride2, stride4] + self._inception_modules(self.pool2(stride4))  # noqa: RUF005

    def _stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stride2 = self.conv1(self.images(x))
        stride4 = self.lrn2(self.conv2(self.conv2_reduce(self.lrn1(self.pool1(stride2)))))
        return stride2, stride4

    def _inception_modules(self, x: Tensor) -> list[Tensor]:
        modules = self.inception
        stride8 = modules["3b"](modules["3a"](x))
        x = modules["4b"](modules["4a"](modules["3c"](stride8)))
        stride16 = modules["4d"](modules["4c"](x))
        stride32 = modules["5b"](modules["5a"](modules["4e"](stride16)))
        return [stride8, stride16, stride32]

    def forward(self, x: Tensor) -> Any:
        """Logits (N, num_classes); or the maps that ``features_only`` asks for."""
        if self.features_only:
            return self.feature_maps(x)
        stride32 = self._inception_modules(self.pool2(self._stem(x)[1]))[-1]
        return self.fc(self.dropout(self.global_pool(stride32)))


def bn_inception(**options: Any) -> BNInception:
    """:class:`BNInception` with these options; a ``TypeError`` for an unknown one names all."""
    known = inspect.signature(BNInception).parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(f"unknown options {unknown}; the options are {sorted(known)}")
    return BNInception(**options)


def _last_map_size(image_size: int | tuple[int, int], stem_stride: int) -> tuple[int, int]:
    """Height and width of the maps of module 5b."""

    def last(side: int) -> int:
        side = (side + 1) // 2  # conv1 rounds up
        side = side // 4 if stem_stride == 8 else side // 2  # the stem's poolings round down
        return (side + 3) // 4  # 3c and 4e round up

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return last(height), last(width)


def _check_options(options: dict[str, Any]) -> None:
    for name, allowed in CHOICES.items():
        if options[name] not in allowed:
            raise ValueError(f"{name} is {options[name]!r}; it must be one of {allowed}")
    for name, least in {"num_classes": 0, "in_chans": 1}.items():
        if options[name] < least:
            raise ValueError(f"{name} is {options[name]}; it must be at least {least}")
    for name in ("width", "eps", "init_scale"):
        value = options[name]
        if not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} is {value!r}; it must be a positive, finite number")
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"dropout is {options['dropout']}; it must be from 0 to below 1")
    if options["global_pool"] == "none" and options["num_classes"]:
        raise ValueError(
            "global_pool='none' leaves a map, on which no classifier can act: set num_classes=0 "
            f"(it is {options['num_classes']})"
        )
    size = options["image_size"]
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(f"image_size is {size!r}; it must be one integer or (height, width)")
    if min(sides) < SMALLEST:
        raise ValueError(f"image_size is {size}; height and width must be at least {SMALLEST}")
