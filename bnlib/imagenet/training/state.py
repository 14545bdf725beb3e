"""What a training run saves and resumes: the network, its average, the optimizer, the step."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bnlib.imagenet import checkpoint
from bnlib.imagenet.data.source import Source
from bnlib.imagenet.processes import Processes
from bnlib.imagenet.recipes import Recipe

__all__ = ["Diverged", "State", "weight_decay_on_weights"]

_LOGGER = logging.getLogger(__name__)
_NEVER = 2**62


class Diverged(Exception):  # noqa: N818  (a result, not an error)
    """Raised if a loss, a parameter or a statistic is not finite after ``step`` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def weight_decay_on_weights(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: the L2 penalty is on the weights of convolutions and classifiers only."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ids = {id(layer.weight) for layer in layers}
    return [
        {"params": [p for p in model.parameters() if id(p) in ids], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": 0.0},
    ]


class State:
    """The state of a training run, new from the recipe's seed or resumed from a checkpoint.

    ``identity`` is everything that determines the run's numbers: the recipe, the fingerprint of the
    data, the number of processes.  ``average`` is the model with averaged weights, None if the
    recipe does not average; ``step`` counts the steps done; ``sums`` are the loss and the fraction
    of correct answers, float32 (2,), summed over the steps since ``logged``, the step of the last
    line of metrics; ``started`` is when the run first was (UTC, ISO 8601).
    """

    def __init__(self, recipe: Recipe, source: Source, group: Processes) -> None:
        self.recipe, self.group, self.classes = recipe, group, source.classes
        self.identity: dict[str, Any] = {
            "recipe": recipe.to_json(),
            "data": source.fingerprint(),
            "processes": group.world,
        }
        torch.manual_seed(recipe.seed)
        model: nn.Module = recipe.network()
        model = model.to(group.device).to(memory_format=torch.channels_last)
        if recipe.sync_bn and group.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.average = copy.deepcopy(model) if recipe.polyak else None
        # listed once: to walk the network takes longer than to average its weights
        self._averaged_and_present = [
            list(each.parameters()) for each in (self.average, model) if each is not None
        ]
        self.optimizer = torch.optim.SGD(
            weight_decay_on_weights(model, recipe.weight_decay),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        self.step = self.logged = 0
        self.sums = torch.zeros(2, device=group.device)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._seconds_before, self._clock = 0.0, time.perf_counter()
        self._first_bad = torch.tensor(_NEVER, device=group.device)

    @property
    def seconds(self) -> float:
        """Seconds spent so far, over all resumptions."""
        return self._seconds_before + time.perf_counter() - self._clock

    def averaged(self) -> nn.Module:
        """A copy of the network for evaluation, with averaged weights if the recipe averages."""
        if self.average is None:
            return copy.deepcopy(self.model).eval()
        network = copy.deepcopy(self.average)
        for own, of_model in zip(network.buffers(), self.model.buffers(), strict=True):
            own.copy_(of_model)
        return network.eval()

    def update_average(self) -> None:
        """Move the averaged weights towards the present ones, if the recipe averages."""
        if self.average is None:
            return
        # faster at the start, or the average would stay near the initial weights
        decay = min(self.recipe.polyak, (1 + self.step) / (10 + self.step)) if self.step else 0.0
        get_ema_multi_avg_fn(decay)(*self._averaged_and_present, None)

    def add_loss(self, loss: Tensor, correct: Tensor) -> None:
        """Note the loss of a micro-batch, and the fraction of correct answers."""
        self.sums += torch.stack([loss, correct]) / self.recipe.accumulate
        bad = torch.where(loss.isfinite(), _NEVER, self.step)
        self._first_bad = torch.minimum(self._first_bad, bad)

    def check_finite(self) -> None:
        """Raise :class:`Diverged` if a loss, parameter or statistic of any process is not finite.

        Its step is the first after which a loss was not, or the present one.
        """
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        found = self._first_bad if finite else self._first_bad.clamp(max=self.step)
        step = -int(self.group.all_reduce_max(-found))
        if step < _NEVER:
            raise Diverged(step)

    def save(self, folder: Path, keep: int, *, raise_on_error: bool) -> None:
        """Write a checkpoint and keep the last few; every process calls this, the first writes.

        If it cannot be written, as when the disk is full, that is an ``OSError`` with
        ``raise_on_error``; without, it is logged.
        """
        self.group.mean(self.sums)
        if not self.group.first:
            return
        state = {
            **self.identity,
            "classes": self.classes,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.averaged().state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "logged": self.logged,
            "started": self.started,
            "seconds": self.seconds,
        }
        try:
            checkpoint.save(folder, state, keep)
        except OSError as error:
            if raise_on_error:
                raise
            _LOGGER.error("no checkpoint at step %d: %s; the next will try again", self.step, error)

    def resume(self, folder: Path, *, adapt: bool) -> None:
        """Go on from the newest checkpoint in the run's folder, if there is one.

        It is a ``CheckpointError`` if none can be read, if the processes find different ones, and,
        without ``adapt``, if it is of another recipe, data set or number of processes.
        """
        if (found := checkpoint.load_latest(folder)) is not None:
            self._load(found, folder, adapt)
        steps = torch.tensor([self.step, -self.step], device=self.group.device)
        most, least = self.group.all_reduce_max(steps).tolist()
        if most != -least:
            raise checkpoint.CheckpointError(
                f"in {folder} one process finds a checkpoint of step {most}, another of step "
                f"{-least}; --out must be a folder that all machines share"
            )

    def _load(self, found: dict[str, Any], folder: Path, adapt: bool) -> None:
        differences = _differences(found, self.identity)
        if differences and not adapt:
            listed = "\n".join(f"  {line}" for line in differences)
            raise checkpoint.CheckpointError(
                f"the checkpoint in {folder} is of another run:\n{listed}\n"
                "Choose another --out, or go on from it all the same with --adapt"
            )
        own = self.optimizer.state_dict()["param_groups"]  # decay and momentum of this recipe
        try:
            self.model.load_state_dict(found["model"])
            if self.average is not None:
                self.average.load_state_dict(found["average"] or found["model"])
            self.optimizer.load_state_dict(found["optimizer"] | {"param_groups": own})
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"the network in {folder} has other layers, to which --adapt cannot adapt: "
                f"{' '.join(str(error).split())}"
            ) from error
        self.step, self.started = found["step"], found["started"]
        self.sums.copy_(found.get("sums", self.sums))
        self.logged = found.get("logged", self.step)
        self._seconds_before = found["seconds"]
        if self.group.first:
            _LOGGER.info("resumed at step %d of %d", self.step, self.recipe.steps)


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between a checkpoint and the run that wants to go on from it, a line each."""
    old, new = json.loads(found["recipe"]), json.loads(wanted["recipe"])
    lines = [
        f"recipe {name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    for name, what in (("data", "data set"), ("processes", "processes")):
        if found.get(name) != wanted[name]:
            lines.append(f"{what}: {found.get(name)!s:.24} there, {wanted[name]!s:.24} here")
    return lines
