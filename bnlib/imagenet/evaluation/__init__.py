"""Accuracy of trained networks: crops, ensembles, calibration, and the curves of Figure 3."""
