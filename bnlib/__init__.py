"""The executable companion to the Batch Normalization paper (Ioffe & Szegedy, 2015)."""

from bnlib.functional import batch_norm
from bnlib.modules import BatchNorm, PerActivationBatchNorm
from bnlib.population import fold_batch_norm, population_statistics

__all__ = [
    "BatchNorm",
    "PerActivationBatchNorm",
    "__version__",
    "batch_norm",
    "fold_batch_norm",
    "population_statistics",
]

__version__ = "0.1.0"
