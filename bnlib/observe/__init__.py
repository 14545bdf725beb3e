"""What happens inside a network: its activations, their distributions, its gradients."""

from bnlib.observe.recorder import ActivationRecorder, Record, find_layers, first_tensor

__all__ = ["ActivationRecorder", "Record", "find_layers", "first_tensor"]
