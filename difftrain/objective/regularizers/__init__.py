"""Regularizers, each a registered module in its own file that reads one denoising pass."""

from difftrain.objective.regularizers.base import WeightedTerm
from difftrain.objective.regularizers.error_propagation import ErrorPropagation
from difftrain.objective.regularizers.noise_constraint import NoiseConstraint
from difftrain.objective.regularizers.step_variation import StepVariation

__all__ = ["ErrorPropagation", "NoiseConstraint", "StepVariation", "WeightedTerm"]
