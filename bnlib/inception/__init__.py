"""BN-Inception, the network of the ImageNet experiments (section 4.2, Figure 5)."""

from bnlib.inception.architecture import BNInception, bn_inception

__all__ = ["BNInception", "bn_inception"]
