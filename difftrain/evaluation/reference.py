"""Reference statistics as files: our own, which say how they were made, and published ones, which do not."""

from pathlib import Path
from typing import Any

from difftrain.evaluation.evaluator import Statistics
from difftrain.evaluation.extractor import FEATURES, FeatureExtractor
from difftrain.evaluation.presets import check_comparable
from difftrain.evaluation.statistics import SPATIAL, FeatureStatistics
from difftrain.registry import InputError


def read_statistics(path: Path, extractor: FeatureExtractor) -> Statistics:
    """What a statistics file holds, as a reference for this extractor's features.

    Raises InputError, with the differences, for a file that was made with other features. A published file states no protocol: its own
    entry says that these features are assumed.
    """
    statistics = FeatureStatistics.load(path)
    stored, own = statistics.protocol.get("features"), extractor.protocol()
    if stored is not None:
        check_comparable(stored, own, f"the statistics in {path}", f"features {extractor.name!r}")
    if statistics.num_features != extractor.widths[FEATURES]:
        raise InputError(f"{path} holds statistics of {statistics.num_features} features, and {extractor.name!r} gives "
                         f"{extractor.widths[FEATURES]}. Make it again with difftrain reference, or write other --features.")
    others = {SPATIAL: statistics.others[SPATIAL]} if SPATIAL in statistics.others else {}
    protocol = statistics.protocol if stored is not None else {**statistics.protocol, "assumed_features": own}
    return Statistics({FEATURES: statistics, **others}, protocol)


def save_statistics(path: Path, by_output: dict[str, FeatureStatistics], protocol: dict[str, Any]) -> None:
    """One file of the features' statistics, with those of the spatial output where they are known."""
    statistics = by_output[FEATURES]
    if SPATIAL in by_output:
        statistics.others[SPATIAL] = by_output[SPATIAL]
    statistics.save(path, protocol)
