"""The training loop of the ImageNet experiments (section 4.2).

    python -m bnlib train bn-x5 --data DIR --out runs/bn-x5              # this machine's GPU or CPU

    torchrun --nproc-per-node 8 -m bnlib train bn-x30 --data DIR --out runs/bn-x30      # eight GPUs

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m bnlib train bn-x30 --data DIR --out runs/bn-x30        # the same on each of two machines

The same command resumes.  Weights, order, augmentation and dropout are functions of the recipe's
seed and the step, so a run that was killed and resumed has, on a CPU, the same weights at the end
to the last bit, whatever the number of workers.

A step is one update from one mini-batch, as the paper counts.  The mini-batch is divided equally
among the processes.  Batch normalization sees what one process computes at once, its micro-batch,
unless ``sync_bn`` joins those of all processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from bnlib.imagenet.checkpoint import alone
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.source import Source, check_classes
from bnlib.imagenet.options import Options
from bnlib.imagenet.processes import Processes, processes
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.log import Metrics
from bnlib.imagenet.training.state import Run, weight_decay_on_weights
from bnlib.imagenet.training.step import follow, loss_of, seed_dropout

__all__ = ["train"]

_LOGGER = logging.getLogger(__name__)
_NEVER = 2**62


def train(recipe: Recipe, data: str | Path, out: str | Path, options: Options) -> str:
    """Train a recipe's network, resuming what stands in ``out``.

    Parameters
    ----------
    recipe
        What to train.
    data
        Where the images are, for :func:`bnlib.imagenet.data.folders.open_source`.
    out
        The run's folder: ``step-*.pt`` checkpoints, ``network.pt`` (for inference, as last
        evaluated), ``metrics.jsonl``, ``tensorboard/``, and at the end ``recorded/`` (a recorded
        run, :mod:`bnlib.runs`).
    options
        Where and how fast to run it, and what to write.

    Returns
    -------
    str
        "finished"; "diverged at step N", when the loss after N steps is not finite, which is a
        result; or "stopped at step N", after SIGTERM or SIGINT, with a checkpoint.

    Raises
    ------
    CheckpointError
        If the checkpoint in ``out`` is of another recipe, data set or number of processes, or
        another process trains there.
    ValueError, SourceError, DamagedImage
        If recipe, options and data do not fit each other or the machine.
    """
    out = Path(out)
    with (
        processes(options.device) as group,
        _stop_signals() as stop,
        contextlib.ExitStack() as stack,
    ):
        device = group.device
        source, held_out = _open(data, "train", group), _open(data, "val", group)
        _check_classes(recipe, source, held_out, group)
        micro_batches = _micro_batches(recipe, group)

        if device.type == "cuda":  # all mini-batches have one shape: the search pays
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(recipe.seed)
        model: nn.Module = recipe.network()
        model = model.to(device).to(memory_format=torch.channels_last)
        if recipe.sync_bn and group.world > 1:
            _check_sync(device)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        average = AveragedModel(model) if recipe.polyak else None
        optimizer = torch.optim.SGD(
            weight_decay_on_weights(model, recipe.weight_decay),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        run = Run(recipe, options, group, out, source, held_out, model, average, optimizer)
        if group.first:
            stack.enter_context(alone(out))
        run.resume()

        network: nn.Module = model
        if group.world > 1:
            network = nn.parallel.DistributedDataParallel(network)
        if options.compile:
            network.compile()
        stream = batches(
            source,
            recipe,
            start_step=run.step,
            rank=group.rank,
            world=group.world,
            workers=options.workers,
            device=device,
        )
        metrics = Metrics(out, run.step, options.tensorboard) if group.first else None
        bar = tqdm(
            total=recipe.steps,
            initial=run.step,
            unit="step",
            disable=None if group.first else True,
        )
        sums, since = torch.zeros(2, device=device), (run.step, time.perf_counter())
        first_bad = torch.tensor(_NEVER, device=device)
        evaluated = run.is_evaluated()  # or a kill came between a checkpoint and its evaluation

        while True:
            ending = run.step >= recipe.steps
            if not evaluated and (ending or _is_due(options.eval_every, run.step)):
                result = run.evaluate()
                if result is None:
                    return run.finish(f"diverged at step {run.step}", metrics, bar)
                if metrics:
                    metrics.write(run.step, evaluation=dataclasses.asdict(result))
                    _LOGGER.info("step %d: held out: %s", run.step, result)
                since = (since[0], since[1] + run.evaluation_s)
            if ending:
                return run.finish("finished", metrics, bar)
            evaluated = False

            step, images, labels = next(stream)
            images = images.to(memory_format=torch.channels_last)
            seed_dropout(recipe, step, group.rank)
            rate = recipe.learning_rate_at(step, stream.steps_per_epoch)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            network.train()
            optimizer.zero_grad(set_to_none=True)
            for number, (part, targets) in enumerate(
                zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True), 1
            ):
                with _gradients_stay(network, number < micro_batches):
                    with run.autocast():
                        logits, loss = loss_of(network(part), targets)
                    (loss / micro_batches).backward()
                right = (logits.argmax(1) == targets).float().mean()
                sums += torch.stack([loss.detach(), right]) / micro_batches
                bad = torch.where(loss.detach().isfinite(), _NEVER, step)
                first_bad = torch.minimum(first_bad, bad)
            optimizer.step()
            run.step = step + 1
            if average is not None:
                follow(average, model, recipe.polyak, step)
            bar.update()

            ending = run.step == recipe.steps
            logging_now = ending or _is_due(options.log_every, run.step)
            # before an evaluation too, as it takes long and may fail
            saving_now = ending or any(
                _is_due(every, run.step) for every in (options.save_every, options.eval_every)
            )
            if logging_now or saving_now:
                worst = _diverged_at(first_bad, run)
                if worst < _NEVER:
                    return run.finish(f"diverged at step {worst}", metrics, bar)
            if logging_now:
                steps, seconds = run.step - since[0], time.perf_counter() - since[1]
                loss, right = (group.mean(sums) / steps).tolist()
                speed = steps * recipe.batch_size / seconds
                bar.set_postfix(loss=f"{loss:.3f}", top1=f"{right:.1%}", img_s=f"{speed:.0f}")
                if metrics:
                    metrics.write(
                        run.step,
                        loss=loss,
                        top1=right,
                        learning_rate=rate,
                        images_per_s=speed,
                        damaged=len(stream.damaged),
                    )
                    if bar.disable:
                        _LOGGER.info(
                            "step %d of %d: loss %.3f, top-1 %.1f %%, %.0f images/s",
                            *(run.step, recipe.steps, loss, 100 * right, speed),
                        )
                sums, since = torch.zeros_like(sums), (run.step, time.perf_counter())
            if saving_now:
                run.save(must=ending)
            if group.any_soon(stop.requested, run.step) and not ending:
                worst = _diverged_at(first_bad, run)
                if worst < _NEVER:
                    return run.finish(f"diverged at step {worst}", metrics, bar)
                run.save(must=True)
                return run.finish(f"stopped at step {run.step}", metrics, bar)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _open(data: str | Path, split: str, group: Processes) -> Source:
    """The images; the first process opens them before the others, as it may unpack archives."""
    source = open_source(data, split) if group.first else None
    group.barrier()
    return open_source(data, split) if source is None else source


def _check_classes(recipe: Recipe, source: Source, held_out: Source, group: Processes) -> None:
    check_classes(held_out, source.classes, source.location)
    if len(source.classes) < recipe.num_classes and group.first:
        _LOGGER.warning(
            "%s has %d classes, the recipe %d; --num-classes %d would leave no output without use",
            *(source.location, len(source.classes), recipe.num_classes, len(source.classes)),
        )


def _diverged_at(first_bad: Tensor, run: Run) -> int:
    """After how many steps the loss, a parameter or a statistic was not finite, in any process."""
    found = first_bad if run.is_finite() else first_bad.clamp(max=run.step)
    return -int(run.group.greatest(-found))


def _micro_batches(recipe: Recipe, group: Processes) -> int:
    parts = group.world * recipe.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"a mini-batch of {recipe.batch_size} cannot be divided among {group.world} processes "
            f"with {recipe.accumulate} micro-batches each; set --batch-size to a multiple of "
            f"{parts}"
        )
    if parts > 1 and recipe.normalization != "none" and group.first:
        joined = recipe.sync_bn and group.world > 1
        examples = recipe.batch_size // (recipe.accumulate if joined else parts)
        _LOGGER.info("batch normalization is over %d examples of %d", examples, recipe.batch_size)
    return recipe.accumulate


def _check_sync(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"sync_bn is torch.nn.SyncBatchNorm, which needs GPUs; the device is {device}. Leave "
            "--sync-bn out"
        )


@contextlib.contextmanager
def _gradients_stay(network: nn.Module, here: bool) -> Iterator[None]:
    """Between micro-batches gradients are not exchanged among the processes."""
    no_sync = getattr(network, "no_sync", contextlib.nullcontext)
    with no_sync() if here else contextlib.nullcontext():
        yield


class _Stop:
    requested, since = False, 0.0


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT ask for a stop after the step.

    Schedulers, terminals and ``torchrun`` may each send the same request, so further ones change
    nothing; but a SIGINT that comes seconds later is somebody who will not wait.
    """
    stop = _Stop()
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        if not stop.requested:
            stop.requested, stop.since = True, time.monotonic()
            _LOGGER.warning("%s: saving and stopping", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - stop.since > 5:
            raise KeyboardInterrupt

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        with contextlib.suppress(ValueError):  # not in the main thread: signals go elsewhere
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
