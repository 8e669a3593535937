"""Scores of generated samples: feature extractors, distances of feature sets, an evaluator.

The distances are importable from here, and two functions for loops of your own: `score` and `fid`,
with `Resizing` for pictures of several sizes. They load on first use, so importing the package
stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftrain.evaluation.distances.frechet import frechet_distance
    from difftrain.evaluation.distances.kernel import kernel_distance
    from difftrain.evaluation.distances.neighbours import precision_recall
    from difftrain.evaluation.distances.statistics import FeatureStatistics
    from difftrain.evaluation.service import fid, score
    from difftrain.evaluation.sources.resizing import Resizing

__all__ = [
    "FeatureStatistics",
    "Resizing",
    "fid",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "score",
]

HOMES = {
    "FeatureStatistics": "distances.statistics",
    "Resizing": "sources.resizing",
    "frechet_distance": "distances.frechet",
    "kernel_distance": "distances.kernel",
    "precision_recall": "distances.neighbours",
    "fid": "service",
    "score": "service",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module in which it lives."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
