"""The experiment of section 4.1: digits, many small networks at once, training, recordings."""

from bnlib.mnist.experiment import (
    PERCENTILES,
    Figure1,
    History,
    Network,
    both,
    build,
    grid,
    train,
)
from bnlib.mnist.stacks import mini_batches

__all__ = [
    "PERCENTILES",
    "Figure1",
    "History",
    "Network",
    "both",
    "build",
    "grid",
    "mini_batches",
    "train",
]
