"""Entry points of ``torch.hub``: ``torch.hub.load(repository, "bn_inception")``."""

from bnlib.inception import bn_inception
from bnlib.inception import load_cadene as bn_inception_cadene

__all__ = ["bn_inception", "bn_inception_cadene", "dependencies"]

dependencies = ["torch", "numpy"]
