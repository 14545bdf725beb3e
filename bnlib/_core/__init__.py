"""What the transform and its layers stand on: argument checks, autograd functions, kernels."""
