"""The networks of section 4.2 as recipes: everything that determines the numbers of a run.

Every field of a :class:`Recipe` says what it is and where its value comes from: ``paper, ...`` for
what the paper states, ``reconstruction: ...`` for what it leaves unsaid and what fills the gap,
mostly GoogLeNet (Szegedy et al., 2015), whose variant the paper's Inception is. The same fields
give the command-line flags and the JSON form.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from bnlib.imagenet import fields
from bnlib.imagenet.fields import option
from bnlib.inception import BNInception
from bnlib.runs import check_name

__all__ = ["ENSEMBLE", "RECIPES", "Recipe", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the numbers of a run; the defaults are the paper's Inception.

    Besides it only the images, the number of processes and the rounding of the machine do.  What
    changes no number is in :class:`bnlib.imagenet.options.Options`.  ``dataclasses.fields(Recipe)``
    lists the fields, each with ``metadata["help"]`` and ``metadata["source"]``.

    Raises
    ------
    TypeError
        If a value has the wrong type.
    ValueError
        If a value is out of range, or values contradict each other.
    """

    name: str = option(
        "inception", "name of the run", "paper, section 4.2.2: the names of the networks"
    )
    normalization: str = option(
        "none",
        "batch normalization of every convolution, of none, or per activation in the last module",
        "paper, sections 3.2, 4.2.2 and 4.2.3; reconstruction: which layers are the last hidden "
        "ones is not stated, here module 5b",
        choices=("batch", "none", "per-activation-last"),
    )
    activation: str = option(
        "relu", "nonlinearity", "paper, section 4.2.2", choices=("relu", "sigmoid")
    )
    stem: str = option(
        "plain",
        "first convolution: a plain 7x7, or separable with a depth multiplier of 8",
        "reconstruction: plain, for speed, as in all published ports but one; the paper's own "
        "(Figure 5's asterisk) is separable",
        choices=("plain", "separable"),
    )
    stem_stride: int = option(
        8,
        "stride of the stem; 4 leaves out its first max pooling, for small images",
        "paper, Figure 5: 8",
        choices=(8, 4),
    )
    width: float = option(
        1.0,
        "factor on every channel count of Figure 5, for small trials",
        "paper, Figure 5: 1",
        gt=0,
        le=4,
    )
    pool_proj_4cd: int = option(
        96,
        "pool projection in modules 4c and 4d",
        "reconstruction: Figure 5 prints 128, which contradicts the 576 and 1024 channels that it "
        "states; 96 gives them",
        choices=(96, 128),
    )
    lrn: bool = option(
        True,
        "local response normalization in the stem",
        "paper, section 4.2.1: removed with batch normalization; reconstruction: its place and "
        "constants are GoogLeNet's",
    )
    dropout: float = option(
        0.4,
        "probability of dropping a feature before the classifier",
        "paper, sections 4.2.1 (removed) and 4.2.3 (40% in Inception, 5% or 10% in the ensemble)",
        ge=0,
        lt=1,
    )
    init_scale: float = option(
        1.0,
        "factor on the convolutions' initial weights",
        "paper, section 4.2.3: larger in some networks of the ensemble; reconstruction: how much",
        gt=0,
    )
    image_size: int = option(
        224, "height and width of a training crop, pixels", "paper, Figures 4 and 5", ge=32
    )
    num_classes: int = option(1000, "classes", "paper, section 4.2", ge=2)
    batch_size: int = option(
        32, "examples of a mini-batch, over all processes together", "paper, section 4.2", ge=1
    )
    accumulate: int = option(
        1,
        "micro-batches of a process's share, one after another, each normalized by itself",
        "reconstruction: none; it takes less memory",
        ge=1,
    )
    sync_bn: bool = option(
        False,
        "batch normalization over all processes together, on GPUs; otherwise each has its own",
        "reconstruction: each its own, as the paper states no exchange between workers",
    )
    precision: str = option(
        "float32",
        "of training's forward passes; bf16 is autocast, evaluation always in float32",
        "reconstruction: not stated",
        choices=("float32", "bf16"),
    )
    learning_rate: float = option(
        0.0015,
        "initial learning rate",
        "paper, Figure 3: 0.0015; times 5 and times 30 for the faster networks",
        gt=0,
    )
    momentum: float = option(
        0.9,
        "momentum of SGD",
        "paper, section 4.2: momentum; reconstruction: its value is GoogLeNet's",
        ge=0,
        lt=1,
    )
    weight_decay: float = option(
        2e-4,
        "weight of the L2 penalty",
        "paper, section 4.2.1: a fifth with batch normalization; reconstruction: the base value is "
        "that of the published GoogLeNet port in Caffe",
        ge=0,
    )
    lr_decay: float = option(
        0.96,
        "factor on the learning rate every lr_decay_epochs",
        "paper, section 4.2.1: exponential; reconstruction: the factor is GoogLeNet's",
        gt=0,
        le=1,
    )
    lr_decay_epochs: float = option(
        8.0,
        "epochs between two decays of the learning rate",
        "paper, section 4.2.1: six times faster with batch normalization; reconstruction: the base "
        "value is GoogLeNet's",
        gt=0,
    )
    steps: int = option(
        31_000_000,
        "training steps",
        "paper, Figure 3: Inception's steps to 72.2%, and section 4.2.2: BN-x30's to its maximum; "
        "reconstruction: the others train as long as the one of these two that they resemble",
        ge=1,
        lt=10**9,  # the digits of a checkpoint's name
    )
    polyak: float = option(
        0.9999,
        "decay of the averaged weights per step; 0 for no averaging",
        "reconstruction: GoogLeNet averaged its weights, at a rate that it does not state",
        ge=0,
        lt=1,
    )
    within_shard_shuffling: bool = option(
        False, "shuffle within the shards too, not only the shards", "paper, section 4.2.1"
    )
    shards: int = option(
        1024,
        "shards that the training set lies in",
        "reconstruction: the paper does not state the number; about 1250 images a shard",
        ge=1,
    )
    photometric: float = option(
        1.0,
        "strength of the photometric distortions: 1 full, 0 none",
        "paper, section 4.2.1: reduced with batch normalization; reconstruction: the distortions "
        "are Howard's (2013), as in GoogLeNet, and reduced means half",
        ge=0,
        le=1,
    )
    min_area: float = option(
        0.08,
        "smallest area of a training crop, as a fraction of the image",
        "reconstruction: GoogLeNet's",
        gt=0,
        le=1,
    )
    max_aspect: float = option(
        4 / 3,
        "greatest aspect ratio of a training crop; the smallest is its inverse",
        "reconstruction: GoogLeNet's",
        ge=1,
    )
    statistics: str = option(
        "population",
        "what evaluation normalizes with: population statistics (Algorithm 2) or moving averages",
        "paper, section 3.1 and Algorithm 2",
        choices=("population", "moving"),
    )
    statistics_batches: int = option(
        200,
        "training mini-batches that population statistics are taken over",
        "reconstruction: the paper does not state the number",
        ge=1,
    )
    seed: int = option(
        0,
        "seed of the weights, the order and the augmentation",
        "reconstruction: not stated",
        ge=0,
        lt=2**63,
    )

    def __post_init__(self) -> None:
        fields.check(self)
        check_name(self.name)
        if self.sync_bn and self.normalization == "per-activation-last":
            raise ValueError(
                "sync_bn cannot join statistics per activation (normalization is "
                "'per-activation-last'). Leave --sync-bn out"
            )

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other values; that a field does not exist is a ``TypeError``."""
        known = [entry.name for entry in dataclasses.fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            raise TypeError(f"a recipe has no fields {unknown}; it has {known}")
        return dataclasses.replace(self, **changes)

    def network(self) -> BNInception:
        """The network with new weights, drawn from torch's global generator."""
        return BNInception(
            self.num_classes,
            width=self.width,
            pool_proj_4cd=self.pool_proj_4cd,
            stem=self.stem,
            stem_stride=self.stem_stride,
            normalization=self.normalization,
            activation=self.activation,
            lrn=self.lrn,
            dropout=self.dropout,
            image_size=self.image_size,
            init_scale=self.init_scale,
        )

    def learning_rate_at(self, step: int, steps_per_epoch: float) -> float:
        """The learning rate of a step, counted from 0.

        A staircase: GoogLeNet lowered the rate by 4% every 8 epochs. The paper says only that the
        decay is exponential; a continuous one would differ by at most one stair.
        """
        stairs = math.floor(step / (self.lr_decay_epochs * steps_per_epoch))
        return self.learning_rate * self.lr_decay**stairs

    def to_json(self) -> str:
        """The recipe as a JSON object, from which :meth:`from_json` makes an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that :meth:`to_json` wrote; other text is a ValueError or a TypeError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the recipe is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the recipe must be a JSON object; got a {type(values).__name__}")
        known = {entry.name for entry in dataclasses.fields(cls)}
        missing, unknown = sorted(known - values.keys()), sorted(values.keys() - known)
        if missing or unknown:
            raise ValueError(
                f"the recipe lacks the fields {missing} and has the unknown fields {unknown}; "
                "it was written by another version of bnlib, or altered"
            )
        return cls(**values)


_INCEPTION = Recipe()
_BASELINE = _INCEPTION.replace(name="bn-baseline", normalization="batch")
# The seven changes of section 4.2.1, in its order.
_X5 = _BASELINE.replace(
    name="bn-x5",
    learning_rate=5 * _BASELINE.learning_rate,
    dropout=0.0,
    weight_decay=_BASELINE.weight_decay / 5,
    lr_decay_epochs=_BASELINE.lr_decay_epochs / 6,
    lrn=False,
    within_shard_shuffling=True,
    photometric=0.5,
    # and as long as BN-x30, whose maximum comes at six million steps (section 4.2.2)
    steps=6_000_000,
)
_X30 = _X5.replace(name="bn-x30", learning_rate=30 * _BASELINE.learning_rate)

RECIPES: dict[str, Recipe] = {
    each.name: each
    for each in (
        _INCEPTION,
        _BASELINE,
        _X5,
        _X30,
        _X5.replace(name="bn-x5-sigmoid", activation="sigmoid"),
        # the two that section 4.2.2 reports as failing
        _INCEPTION.replace(name="inception-x5", learning_rate=5 * _INCEPTION.learning_rate),
        _INCEPTION.replace(name="inception-sigmoid", activation="sigmoid"),
    )
}

# Section 4.2.3: six networks, each BN-x30 with some of three changes.  Which network had which,
# and how much larger the weights were, is not stated: this assignment is a reconstruction.
_MEMBERS: tuple[dict[str, Any], ...] = (
    {"init_scale": 1.5},
    {"dropout": 0.05},
    {"dropout": 0.1},
    {"normalization": "per-activation-last"},
    {"init_scale": 1.5, "dropout": 0.05},
    {"normalization": "per-activation-last", "dropout": 0.1},
)
ENSEMBLE: dict[str, Recipe] = {
    f"bn-x30-member-{number}": _X30.replace(name=f"bn-x30-member-{number}", seed=number, **changes)
    for number, changes in enumerate(_MEMBERS, 1)
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, from ``RECIPES`` or ``ENSEMBLE``.

    Raises
    ------
    ValueError
        If there is none; the message names those that exist.
    """
    known = RECIPES | ENSEMBLE
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(known)}")
    return known[name]
