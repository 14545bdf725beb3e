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
import functools
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnlib.imagenet.checkpoint import lock_run_folder
from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.data.loader import batches
from bnlib.imagenet.data.source import Source, check_classes
from bnlib.imagenet.options import Options
from bnlib.imagenet.processes import Processes, processes
from bnlib.imagenet.recipes import Recipe
from bnlib.imagenet.training.held_out import evaluate_held_out
from bnlib.imagenet.training.log import Report
from bnlib.imagenet.training.state import Diverged, State
from bnlib.imagenet.training.step import train_step
from bnlib.runs import Verdict

__all__ = ["train"]

_LOGGER = logging.getLogger(__name__)
_PATIENCE_S = 5.0


def train(recipe: Recipe, data: str | Path, out: str | Path, options: Options) -> Verdict:
    """Train a recipe's network, resuming what stands in ``out``.

    Parameters
    ----------
    recipe
        What to train.
    data
        Where the images are, for :func:`bnlib.imagenet.data.folders.open_source`.
    out
        The run's folder: ``step-*.pt`` checkpoints, ``network.pt`` (for inference, as last
        evaluated), ``metrics.jsonl``, ``tensorboard/``, ``data-*.idx`` (the listing of the images,
        which a resumption does not make again), and at the end ``recorded/`` (a recorded run,
        :mod:`bnlib.runs`).
    options
        Where and how fast to run it, and what to write.

    Returns
    -------
    Verdict
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
        _stop_signals() as is_stop_asked,
        lock_run_folder(out) if group.first else contextlib.nullcontext(),
    ):
        _check_machine(recipe, group)
        source, held_out = _open(data, "train", out, group), _open(data, "val", out, group)
        _check_classes(recipe, source, held_out, group)
        if group.device.type == "cuda":  # all mini-batches have one shape: the search pays
            torch.backends.cudnn.benchmark = True
        state = State(recipe, source, group)
        state.resume(out, adapt=options.adapt)
        network = state.model
        if group.world > 1:
            network = nn.parallel.DistributedDataParallel(network)
        if options.compile:
            network.compile()
        stream = functools.partial(
            batches,
            source,
            recipe,
            rank=group.rank,
            world=group.world,
            workers=options.workers,
            device=group.device,
        )
        loader, report = stream(start_step=state.step), Report(state, out, options)

        def evaluate() -> None:
            with report.pause():
                accuracy = evaluate_held_out(state, stream, held_out, out, options)
            report.evaluation(accuracy)

        def is_due(every: int) -> bool:
            return state.step == recipe.steps or (every > 0 and state.step % every == 0)

        eval_at = set(map(int, options.eval_at.split()))

        def is_evaluation_due() -> bool:
            return is_due(options.eval_every) or state.step in eval_at

        try:
            if state.step and is_evaluation_due() and not report.is_evaluated():
                evaluate()  # a kill came between a checkpoint and its evaluation
            for _, images, labels in itertools.islice(loader, recipe.steps - state.step):
                train_step(state, network, images, labels, loader.steps_per_epoch)
                report.advance()
                is_last = state.step == recipe.steps
                stopping = not is_last and is_stop_asked(state)
                log, evaluation = is_due(options.log_every), is_evaluation_due()
                # before an evaluation too, as it takes long and may fail
                save = is_due(options.save_every) or evaluation or stopping
                if log or save:
                    state.check_finite()
                if log:
                    report.training(len(loader.damaged))
                if save:
                    state.save(out, options.keep, raise_on_error=is_last or stopping)
                if stopping:
                    verdict = Verdict("stopped", state.step)
                    break
                if evaluation:
                    evaluate()
            else:
                verdict = Verdict("finished")
        except Diverged as error:
            verdict = Verdict("diverged", error.step)
        report.finish(verdict, source.location)
        return verdict


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[State], bool]]:
    """SIGTERM and SIGINT ask for a stop after the step; gives whether any process is asked to.

    Schedulers, terminals and ``torchrun`` may each send the same request, so further ones change
    nothing; but a SIGINT that comes seconds later is from somebody who will not wait.
    """
    asked: list[float] = []
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            _LOGGER.warning("%s: saving and stopping", signal.Signals(number).name)
        elif number == signal.SIGINT and asked[-1] - asked[0] > _PATIENCE_S:
            raise KeyboardInterrupt

    def is_stop_asked(state: State) -> bool:
        if state.group.world > 1 and state.step % 10:  # many processes ask each other rarely
            return False
        return state.group.any_rank(bool(asked))

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        with contextlib.suppress(ValueError):  # not in the main thread: signals go elsewhere
            before[number] = signal.signal(number, ask)
    try:
        yield is_stop_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(data: str | Path, split: str, out: Path, group: Processes) -> Source:
    """The images; the first process unpacks and lists them, the others read its index."""
    index = out / f"data-{split}.idx"
    return group.after_first(lambda: open_source(data, split, index))


def _check_classes(recipe: Recipe, source: Source, held_out: Source, group: Processes) -> None:
    check_classes(held_out, source.classes, source.location)
    if len(source.classes) < recipe.num_classes and group.first:
        _LOGGER.warning(
            "%s has %d classes, the recipe %d; --num-classes %d would leave no output without use",
            *(source.location, len(source.classes), recipe.num_classes, len(source.classes)),
        )


def _check_machine(recipe: Recipe, group: Processes) -> None:
    """Refuse a recipe that these processes cannot run."""
    parts = group.world * recipe.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"a mini-batch of {recipe.batch_size} cannot be divided among {group.world} processes "
            f"with {recipe.accumulate} micro-batches each; set --batch-size to a multiple of "
            f"{parts}"
        )
    joined = recipe.sync_bn and group.world > 1
    if joined and group.device.type != "cuda":
        raise ValueError(
            "sync_bn is torch.nn.SyncBatchNorm, which needs GPUs; the device is "
            f"{group.device}. Leave --sync-bn out"
        )
    if parts > 1 and recipe.normalization != "none" and group.first:
        examples = recipe.batch_size // (recipe.accumulate if joined else parts)
        _LOGGER.info("batch normalization is over %d examples of %d", examples, recipe.batch_size)
