"""How a recipe is run on a machine: everything that changes the speed and the reports, hardly the
result.  What determines the result is the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from bnlib.imagenet import fields
from bnlib.imagenet.fields import option
from bnlib.runs import check_name

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How to run; one flag of ``python -m bnlib train`` for each field.

    Raises
    ------
    TypeError, ValueError
        If a value has the wrong type or is out of range.
    """

    device: str = option("auto", "cpu, cuda or auto: a GPU where there is one")
    precision: str = option(
        "auto",
        "bf16: autocast of convolutions and the classifier; float32; auto: bf16 on a GPU",
        choices=("auto", "bf16", "float32"),
    )
    compile: bool = option(False, "torch.compile the network")
    accumulate: int = option(
        1,
        "micro-batches that a mini-batch is computed in, one after another; batch normalization "
        "then normalizes each micro-batch by itself",
        least=1,
    )
    sync_bn: bool = option(
        False, "batch normalization over all processes; else each process over its own share"
    )
    workers: int = option(2, "processes that prepare mini-batches", least=0)
    eval_every: int = option(
        10_000, "steps between evaluations; 0 for none before the end", least=0
    )
    statistics: str = option(
        "population",
        "what evaluation normalizes with: population statistics (Algorithm 2) or moving averages",
        choices=("population", "moving"),
    )
    statistics_batches: int = option(
        200, "training mini-batches that population statistics are taken over", least=1
    )
    eval_batch: int = option(100, "images of an evaluation batch", least=1)
    save_every: int = option(2000, "steps between checkpoints", least=1)
    keep: int = option(3, "checkpoints that are kept", least=1)
    log_every: int = option(100, "steps between two lines of metrics", least=1)
    tensorboard: bool = option(True, "write TensorBoard's files too, where it is installed")
    experiment: str = option("imagenet", "folder of the recorded run, in recorded/")
    adapt: bool = option(
        False, "go on from a checkpoint although recipe, data set or number of processes differ"
    )

    def __post_init__(self) -> None:
        fields.check(self)
        check_name(self.experiment)
