"""Runtime options: where and how fast a recipe is run, and what is written.  They change no number
of the result; what does is the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from bnlib.imagenet import fields
from bnlib.imagenet.fields import option
from bnlib.runs import check_name

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How to run; one flag of ``python -m bnlib train`` for each field.

    Every field may be changed between a run and its resumption.  ``device`` and ``compile`` change
    the order of floating-point operations, and with it the rounding of the results.  A value of the
    wrong type is a ``TypeError``, one out of range a ``ValueError``.
    """

    device: str = option("auto", "cpu, cuda or auto: a GPU where there is one")
    compile: bool = option(False, "torch.compile the network; this changes rounding only")
    workers: int = option(2, "processes that prepare mini-batches", ge=0)
    eval_every: int = option(10_000, "steps between evaluations; 0 for none before the end", ge=0)
    eval_at: str = option("", "further steps to evaluate after, such as '250 500 1000'")
    eval_batch: int = option(100, "images of an evaluation batch", ge=1)
    save_every: int = option(2000, "steps between checkpoints", ge=1)
    keep: int = option(3, "checkpoints that are kept", ge=1)
    log_every: int = option(100, "steps between two lines of metrics", ge=1)
    tensorboard: bool = option(True, "write TensorBoard's files too, where it is installed")
    experiment: str = option("imagenet", "folder of the recorded run, in recorded/")
    adapt: bool = option(
        False, "go on from a checkpoint although recipe, data set or number of processes differ"
    )

    def __post_init__(self) -> None:
        fields.check(self)
        check_name(self.experiment)
        if not all(step.isdecimal() for step in self.eval_at.split()):
            raise ValueError(
                f"eval_at is {self.eval_at!r}; it must be steps with spaces between them"
            )
