"""What the tests of the command line start from."""

from imagenet_runs import data, tiny

__all__ = ["data", "tiny"]
