"""Scores of generated images: feature extractors, distances between feature sets, and the evaluator that joins them.

The distances are importable from here; they load on first use, so that importing the package stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftrain.evaluation.kernel import kernel_distance
    from difftrain.evaluation.neighbours import precision_recall
    from difftrain.evaluation.statistics import FeatureStatistics, frechet_distance

__all__ = ["FeatureStatistics", "frechet_distance", "kernel_distance", "precision_recall"]

HOMES = {
    "FeatureStatistics": "statistics",
    "frechet_distance": "statistics",
    "kernel_distance": "kernel",
    "precision_recall": "neighbours",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
