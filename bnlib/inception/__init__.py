"""BN-Inception, the network of the ImageNet experiments (section 4.2, Figure 5)."""

from bnlib.inception.architecture import BNInception, bn_inception
from bnlib.inception.costs import ModuleCost, module_costs
from bnlib.inception.weights import cadene_transform, load_cadene, to_cadene

__all__ = [
    "BNInception",
    "ModuleCost",
    "bn_inception",
    "cadene_transform",
    "load_cadene",
    "module_costs",
    "to_cadene",
]
