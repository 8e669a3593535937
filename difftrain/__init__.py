"""difftrain: training methods for diffusion models, each as one formula in its own slot."""

__version__ = "0.1.0"
