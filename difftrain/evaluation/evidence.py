"""What metrics look at: feature rows, statistics and labels of the generated, reference and training images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.statistics import FeatureStatistics, statistics_of
from difftrain.registry import InputError

NEAREST = "nearest"  # [distance, index] of the nearest training image, float64: of sets that were compared with the training images
TEXT = "text"  # the prompts' features, in the space of the images' features

Need = Literal["reference images", "training", "labels", "classes", "logits", "spatial", "text", "nearest"]

REMEDIES: dict[Need, str] = {
    "reference images": "give the images themselves as reference, not their statistics",
    "training": "give the training images",
    "labels": "generate with class labels",
    "classes": "use features that come from a classifier of the labels, such as features: {type: digits_classifier}",
    "logits": "use features with logits, such as features: {type: inception}",
    "spatial": "use features with a spatial output: features: {type: inception}",
    "text": "give images with captions, and features that read text: features: {type: clip}",
    "nearest": "give the training images",
}


@dataclass(frozen=True)
class FeatureSet:
    """One set of images as metrics see it, the same on every process.

    outputs: rows by name, row i of image i: "features" [N, D], and what else the extractor gives ("logits", "spatial") or was asked for.
    labels: [N] long. known: statistics by output of a set whose rows are not known, as a statistics file holds them.
    """

    outputs: Mapping[str, Rows]
    labels: Tensor | None = None
    known: Mapping[str, FeatureStatistics] = field(default_factory=dict)
    computed: dict[str, FeatureStatistics] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.outputs[FEATURES]) if FEATURES in self.outputs else self.known[FEATURES].count

    def statistics(self, output: str = FEATURES) -> FeatureStatistics:
        """Of an output's rows, computed once by all processes together. Collective where they are not known."""
        if output in self.known:
            return self.known[output]
        if output not in self.computed:
            self.computed[output] = statistics_of(self.outputs[output], dealt=True)
        return self.computed[output]


@dataclass(frozen=True)
class Evidence:
    """Everything that the metrics of one evaluation share; the same on every process. preset: the protocol's own settings, such as
    `{"kid_subsets": 100}`."""

    generated: FeatureSet
    reference: FeatureSet
    training: FeatureSet | None
    features_name: str
    seed: int
    preset: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """A registered part: plain values in the constructor, one call."""

    scores: tuple[str, ...]  # the names of the scores that it gives
    needs: frozenset[Need]

    def __call__(self, evidence: Evidence) -> dict[str, dict[str, Any]]:
        """Scores by name, each a JSON-able dict with at least `value`. Collective: called on every process, the same result on all."""


def check_needs(metrics: Sequence[Metric], available: Collection[Need], features: str) -> None:
    """Raise InputError, naming metric and remedy, unless everything that the metrics need is available.

    features: the extractor's name. A metric with a name that belongs to certain features says so: `only_with`, and what to write `instead`.
    """
    for metric in metrics:
        check_name(metric, features)
    missing = [(name_of(metric), need) for metric in metrics for need in get_args(Need) if need in metric.needs and need not in available]
    if missing:
        raise InputError("\n".join(f"metric {name!r} needs {need}: {REMEDIES[need]}, or leave the metric out." for name, need in missing))


def check_counts(metrics: Sequence[Metric], counts: Mapping[str, int], width: int, preset: Mapping[str, Any]) -> None:
    """Raise InputError, naming the metric, where a set has fewer images than the metric needs of each.

    counts: images by the set's name. width, preset: the extractor's. A metric that needs more than two says so: `fewest(width, preset)`.
    """
    for metric in metrics:
        fewest = metric.fewest(width, preset) if hasattr(metric, "fewest") else 2
        for name, count in counts.items():
            if count < fewest:
                raise InputError(f"metric {name_of(metric)!r} needs at least {fewest} {name} images, and there are {count}. Give more, or "
                                 "change the metric's arguments.")


def check_name(metric: Any, features: str) -> None:
    """Raise InputError for a metric whose name stands for one network's features, with those of another."""
    only = getattr(metric, "only_with", None)
    if only is not None and features != only:
        raise InputError(f"metric {name_of(metric)!r} is the name for features {only!r}, and these are {features!r}: write "
                         f"{getattr(metric, 'instead', 'another metric')}.")


def name_of(part: Any) -> str:
    """The name under which a part is registered, or that of its class."""
    return part.registered_as[1] if hasattr(part, "registered_as") else type(part).__name__
