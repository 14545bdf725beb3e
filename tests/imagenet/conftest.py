"""What most tests of training and evaluation start from."""

from imagenet_runs import data, tiny

__all__ = ["data", "tiny"]
