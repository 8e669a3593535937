"""Added loss terms: each a registered module of its own file, which reads one denoising pass."""

from difftrain.regularizers.error_propagation import ErrorPropagation
from difftrain.regularizers.noise_constraint import NoiseConstraint
from difftrain.regularizers.step_variation import StepVariation

__all__ = ["ErrorPropagation", "NoiseConstraint", "StepVariation"]
