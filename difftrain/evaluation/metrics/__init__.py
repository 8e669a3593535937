"""Scores of a generated set against real images, a file for each family. Each metric says what it needs and returns named scores.

A metric is called on every process with the same evidence, deals its work out and gives the same scores to all.
"""

from difftrain.evaluation.metrics.frechet import Fid, FrechetDistance, Sfid
from difftrain.evaluation.metrics.kernel import Cmmd, GaussianMmd, KernelDistance, Kid
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.evaluation.metrics.neighbours import DensityCoverage, PrecisionRecall
from difftrain.evaluation.metrics.predictions import ClassAgreement, ClassifierScore, InceptionScore
from difftrain.evaluation.metrics.text import ClipScore

__all__ = [
    "ClassAgreement", "ClassifierScore", "ClipScore", "Cmmd", "DensityCoverage", "Fid", "FrechetDistance", "GaussianMmd", "InceptionScore",
    "KernelDistance", "Kid", "NearestNeighbourRatio", "PrecisionRecall", "Sfid",
]  # fmt: skip
