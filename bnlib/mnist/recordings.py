"""The recorded runs behind chapter 10: which settings, and how they are written down.

Record them again (about an hour on two cores, with MNIST under ``$BNLIB_DATA``)::

    python -m bnlib.mnist.recordings sweep figure speed threshold
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bnlib import runs
from bnlib.mnist.experiment import PERCENTILES, Figure1, History, Network, grid, train

EXPERIMENT = "mnist-figure1"
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WEIGHT_STDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
THRESHOLDS = (0.0, 0.25, 0.75)
BOTH = (True, False)  # with and without normalization
#: Three points of the sweep. ``slow`` is one where the curves have the shape of the paper's
#: Figure 1a; ``best`` is where the network *without* normalization ends highest, and ``peak`` where
#: the one *with* it does.
SETTINGS = {
    "slow": {"learning_rate": 0.03, "weight_std": 0.1},
    "best": {"learning_rate": 3.0, "weight_std": 0.3},
    "peak": {"learning_rate": 0.1, "weight_std": 0.03},
}
#: Learning rate and deviation at which each network is ahead at the sweep's first evaluation.
FASTEST = {
    True: {"learning_rate": 3.0, "weight_std": 0.3},
    False: {"learning_rate": 3.0, "weight_std": 0.1},
}
#: Those in which other thresholds were recorded.
THRESHOLD_SETTINGS = ("slow", "best")


def network_name(normalize: bool) -> str:
    """``bn`` or ``plain``: how a recorded run's name tells the two networks apart."""
    return "bn" if normalize else "plain"


def configured(config: Figure1, setting: str, normalize: bool) -> Figure1:
    """The configuration with one of :data:`SETTINGS` and one of the two networks chosen.

    Raises
    ------
    ValueError
        For an unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}; got {setting!r}")
    chosen = SETTINGS[setting]
    return replace(
        config,
        normalize=normalize,
        learning_rate=chosen["learning_rate"],
        weight_std=chosen["weight_std"],
    )


def record_sweep(
    config: Figure1, root: Path | None = None, networks: Sequence[bool] = BOTH
) -> None:
    """Both networks, one seed, at every pair of learning rate and weight deviation."""
    config = replace(config, evaluate_every=max(1, config.steps // 20))
    pairs = grid(LEARNING_RATES, WEIGHT_STDS, config.seeds[0])
    for normalize in networks:
        name = f"sweep-{network_name(normalize)}"
        _record(replace(config, normalize=normalize), {name: _curves}, root, pairs)


def record_figure(
    config: Figure1,
    root: Path | None = None,
    networks: Sequence[bool] = BOTH,
    settings: Sequence[str] = tuple(SETTINGS),
) -> None:
    """Figure 1 itself: every seed in each setting (``peak`` with BN only), every unit of one."""
    for setting in settings:
        for normalize in networks:
            if setting == "peak" and not normalize:
                continue
            name = f"{setting}-{network_name(normalize)}"
            tables = {name: _curves_and_percentiles, f"units-{name}": _units}
            _record(configured(config, setting, normalize), tables, root)


def record_speed(
    config: Figure1, root: Path | None = None, networks: Sequence[bool] = BOTH
) -> None:
    """The first steps of both networks, ten seeds, each where it is fastest (``FASTEST``)."""
    config = replace(
        config, seeds=tuple(range(10)), steps=min(config.steps, 3000), evaluate_every=100
    )
    for normalize in networks:
        name = f"speed-{network_name(normalize)}"
        fastest: dict[str, Any] = FASTEST[normalize]
        _record(replace(config, normalize=normalize, **fastest), {name: _curves}, root)


def record_threshold(
    config: Figure1, root: Path | None = None, networks: Sequence[bool] = BOTH
) -> None:
    """Both networks, three seeds, in both settings, at other binarization thresholds."""
    config = replace(config, seeds=config.seeds[:3], evaluate_every=max(1, config.steps // 20))
    for setting in THRESHOLD_SETTINGS:
        for threshold in THRESHOLDS:
            for normalize in networks:
                name = f"threshold-{setting}-{threshold:g}-{network_name(normalize)}"
                chosen = replace(configured(config, setting, normalize), threshold=threshold)
                _record(chosen, {name: _curves}, root)


def _record(
    config: Figure1,
    tables: Mapping[str, Callable[[History], dict[str, np.ndarray]]],
    root: Path | None,
    networks: list[Network] | None = None,
) -> None:
    """Train once, and write each of ``tables`` as a run of its own."""
    print(*tables, flush=True)
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    history = train(config, networks, progress=True)
    for name, table in tables.items():
        runs.write(
            EXPERIMENT,
            name,
            table(history),
            configuration={
                **asdict(config),
                "networks": [asdict(network) for network in history.networks],
            },
            seed=sorted({network.seed for network in history.networks}),
            dataset=history.dataset,
            started=started,
            duration_s=time.perf_counter() - clock,
            root=root,
        )


def _curves(history: History) -> dict[str, np.ndarray]:
    """One row for each network and evaluation."""
    networks, count = history.networks, len(history.steps)
    return {
        "seed": np.repeat([network.seed for network in networks], count),
        "learning_rate": np.repeat([network.learning_rate for network in networks], count),
        "weight_std": np.repeat([network.weight_std for network in networks], count),
        "step": np.tile(history.steps, len(networks)),
        "test_accuracy": history.test_accuracy.ravel(),
        "test_accuracy_batch": history.test_accuracy_batch.ravel(),
        "train_loss_nats": history.train_loss.ravel(),
    }


def _curves_and_percentiles(history: History) -> dict[str, np.ndarray]:
    """The curves, and the percentiles of each network's typical sigmoid."""
    columns = _curves(history)
    units = [history.typical_unit(index) for index in range(len(history.networks))]
    columns["unit"] = np.repeat(units, len(history.steps))
    for rank, percentile in enumerate(PERCENTILES):
        columns[f"p{percentile}"] = np.concatenate(
            [history.percentiles[index, :, rank, unit] for index, unit in enumerate(units)]
        )
    return columns


def _units(history: History) -> dict[str, np.ndarray]:
    """One row for each unit of the first network, at every fifth evaluation."""
    steps, percentiles = history.steps[::5], history.percentiles[0, ::5]
    units = percentiles.shape[2]
    columns: dict[str, np.ndarray] = {
        "unit": np.repeat(np.arange(units), len(steps)),
        "step": np.tile(steps, units),
    }
    for rank, percentile in enumerate(PERCENTILES):
        columns[f"p{percentile}"] = percentiles[:, rank].T.ravel()
    return columns


RECORDINGS: dict[str, Callable[..., None]] = {
    "sweep": record_sweep,
    "figure": record_figure,
    "peak": partial(record_figure, settings=("peak",)),
    "speed": record_speed,
    "threshold": record_threshold,
}


def main() -> None:
    """The command line: ``python -m bnlib.mnist.recordings sweep figure speed threshold``."""
    parser = argparse.ArgumentParser(description="Record the runs of chapter 10.")
    parser.add_argument("what", nargs="+", choices=RECORDINGS, help="which runs to record")
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--network", choices=("bn", "plain"), help="only one of the two")
    parser.add_argument("--steps", type=int, default=Figure1.steps, help="training steps")
    parser.add_argument("--root", type=Path, default=None, help="folder to record into")
    arguments = parser.parse_args()
    config = Figure1(dataset=arguments.dataset, steps=arguments.steps)
    networks = [each for each in BOTH if arguments.network in (None, network_name(each))]
    for what in arguments.what:
        RECORDINGS[what](config, arguments.root, networks)


if __name__ == "__main__":
    main()
