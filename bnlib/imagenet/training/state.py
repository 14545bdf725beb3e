"""A training run as one thing: what is saved, resumed, evaluated and recorded together."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bnlib import runs
from bnlib.imagenet import checkpoint
from bnlib.imagenet.data.decode import DamagedImage
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.evaluation.accuracy import Accuracy, evaluate
from bnlib.imagenet.options import Options
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.log import Metrics, read_metrics
from bnlib.population import population_statistics

__all__ = ["Run", "weight_decay_on_weights"]

_LOGGER = logging.getLogger(__name__)
_COLUMNS = ("loss", "top1", "top5")


def weight_decay_on_weights(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: the L2 penalty is on the weights of convolutions and classifiers only."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [layer.weight for layer in layers]
    ids = {id(weight) for weight in weights}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@dataclasses.dataclass
class Run:
    """What a run is made of, and what happens to all of it together.

    Attributes
    ----------
    step
        Steps done.
    evaluation_s
        Seconds that the last evaluation took.
    """

    recipe: Recipe
    options: Options
    group: Processes
    out: Path
    source: Source
    held_out: Source
    model: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds_before: float = 0.0
    evaluation_s: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._clock = time.perf_counter()
        self.fingerprint = self.source.fingerprint()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where forward passes happen."""
        bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=bf16)

    def is_finite(self) -> bool:
        """Whether all parameters and statistics are finite numbers."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    # What determines the result, beside the state of training.
    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "data": self.fingerprint,
            "processes": self.group.world,
        }

    def save(self, must: bool) -> None:
        """Write a checkpoint; if the disk is full, an error only when it ``must`` be."""
        if not self.group.first:
            return
        state = {
            **self._identity(),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "started": self.started,
            "seconds": self.seconds,
            "classes": self.source.classes,
        }
        try:
            checkpoint.save(self.out, state, self.options.keep)
        except OSError as error:
            if must:
                raise
            _LOGGER.error("no checkpoint at step %d: %s; the next will try again", self.step, error)

    @property
    def seconds(self) -> float:
        """Seconds spent so far, over all resumptions."""
        return self.seconds_before + time.perf_counter() - self._clock

    def resume(self) -> None:
        """Take over the newest checkpoint, if there is one and it is of this very run."""
        self._take_over()
        steps = torch.tensor([self.step, -self.step], device=self.group.device)
        most, least = self.group.greatest(steps).tolist()
        if most != -least:
            raise checkpoint.CheckpointError(
                f"in {self.out} one process finds a checkpoint of step {most}, another of step "
                f"{-least}; --out must be a folder that all machines share"
            )

    def _take_over(self) -> None:
        state = checkpoint.load_latest(self.out) if self.out.is_dir() else None
        if state is None:
            return
        differences = _differences(state, self._identity())
        if differences and not self.options.adapt:
            listed = "\n".join(f"  {line}" for line in differences)
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.out} is of another run:\n{listed}\n"
                "Choose another --out, or go on from it all the same with --adapt"
            )
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"] or self.average.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"the network in {self.out} has other layers, to which --adapt cannot adapt: "
                f"{' '.join(str(error).split())}"
            ) from error
        for fresh, group in zip(
            weight_decay_on_weights(self.model, self.recipe.weight_decay),
            self.optimizer.param_groups,
            strict=True,
        ):
            group["weight_decay"], group["momentum"] = fresh["weight_decay"], self.recipe.momentum
        self.step, self.started = state["step"], state["started"]
        self.seconds_before = state["seconds"]
        if self.group.first:
            _LOGGER.info("resumed at step %d of %d", self.step, self.recipe.steps)

    def is_evaluated(self) -> bool:
        """Whether the metrics have an evaluation of this step, or there is nothing to evaluate."""
        rows = read_metrics(self.out / "metrics.jsonl")
        done = not self.step or any(r["step"] == self.step and "evaluation" in r for r in rows)
        return bool(self.group.greatest(torch.tensor(int(done), device=self.group.device)))

    def evaluate(self) -> Accuracy | None:
        """Accuracy on the held-out images, and ``network.pt``; training is left as it was.

        None if the statistics of the population are not finite: the network has diverged.
        """
        started, recipe, options, group = time.perf_counter(), self.recipe, self.options, self.group
        trained = self.average.module if self.average is not None else self.model
        network = copy.deepcopy(trained)
        if any(isinstance(layer, _BatchNorm) for layer in network.modules()):
            if recipe.statistics == "population":
                stream = batches(
                    self.source,
                    self.recipe,
                    start_step=self.step,
                    rank=group.rank,
                    world=group.world,
                    workers=options.workers,
                    device=group.device,
                )
                some = (next(stream)[1] for _ in range(recipe.statistics_batches))
                overflow = torch.zeros((), device=group.device)
                try:
                    population_statistics(network, some)
                except DamagedImage:
                    raise
                except ValueError as error:  # what else it refuses, training has refused before
                    _LOGGER.warning("%s", error)
                    overflow += 1
                if group.greatest(overflow):
                    return None
            group.average_statistics(network)
        network.eval()
        result = evaluate(
            network,
            self.held_out,
            recipe.image_size,
            group=group,
            workers=options.workers,
            batch=options.eval_batch,
        )
        if group.first:
            buffer = io.BytesIO()
            state = {
                "recipe": self.recipe.to_json(),
                "step": self.step,
                "classes": self.source.classes,
            }
            torch.save({**state, "model": network.state_dict()}, buffer)
            with _reported("network.pt"):
                runs.write_atomically(self.out / "network.pt", buffer.getbuffer())
        self.evaluation_s = time.perf_counter() - started
        return result

    def finish(self, verdict: str, metrics: Metrics | None, bar: Any) -> str:
        """Close the reports; record a run that came to its end."""
        bar.close()
        if metrics:
            metrics.write(self.step, verdict=verdict)
            metrics.close()
            if not verdict.startswith("stopped"):
                with _reported("the recorded run"):
                    self._record(verdict)
            _LOGGER.info("%s: %s", self.recipe.name, verdict)
        self.group.barrier()
        return verdict

    def _record(self, verdict: str) -> None:
        rows = read_metrics(self.out / "metrics.jsonl")
        lines = []
        for row in rows:
            held_out = row.get("evaluation")
            if held_out:
                lines.append((row["step"], "held out", *(held_out[k] for k in _COLUMNS)))
            elif "loss" in row:
                lines.append((row["step"], "training", row["loss"], row["top1"], float("nan")))
        columns = list(zip(*lines, strict=True)) or [()] * 5
        names = ("step", "part", "cross_entropy_nats", "top1", "top5")
        runs.write(
            self.options.experiment,
            self.recipe.name,
            dict(zip(names, columns, strict=True)),
            configuration={
                "recipe": dataclasses.asdict(self.recipe),
                "options": dataclasses.asdict(self.options),
                "processes": self.group.world,
            },
            seed=self.recipe.seed,
            dataset={"name": self.source.location, "sha256": self.fingerprint},
            started=self.started,
            duration_s=self.seconds,
            verdict=verdict,
            root=self.out / "recorded",
        )


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """A file that cannot be written is reported; training goes on without it."""
    try:
        yield
    except OSError as error:
        _LOGGER.error("%s cannot be written: %s", what, error)


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between a checkpoint and the run that wants to go on from it, a line each."""
    lines = []
    old, new = json.loads(found["recipe"]), json.loads(wanted["recipe"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            lines.append(f"recipe {name}: {old.get(name)!r} there, {new.get(name)!r} here")
    for name in sorted(wanted.keys() - {"recipe"}):
        if found.get(name) != wanted[name]:
            what = "data set" if name == "data" else name.replace("_", " ")
            lines.append(f"{what}: {found.get(name)!s:.24} there, {wanted[name]!s:.24} here")
    return lines
