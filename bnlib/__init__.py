"""The executable companion to the Batch Normalization paper (Ioffe & Szegedy, 2015)."""

from bnlib.functional import batch_norm
from bnlib.inception import BNInception, bn_inception
from bnlib.modules import BatchNorm, PerActivationBatchNorm
from bnlib.population import fold_batch_norm, population_statistics

__all__ = [
    "BNInception",
    "BatchNorm",
    "PerActivationBatchNorm",
    "__version__",
    "batch_norm",
    "bn_inception",
    "fold_batch_norm",
    "population_statistics",
]

__version__ = "0.1.0"
