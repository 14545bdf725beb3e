"""Accuracy of trained networks: crops, ensembles, and the curves of Figure 3."""
