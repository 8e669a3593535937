"""What metrics look at: the generated, reference and training images, with their features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from difftrain.data.items import Images
from difftrain.evaluation.features import FeatureExtractor
from difftrain.evaluation.storage import digest
from difftrain.registry import InputError

Need = Literal["reference", "training", "pixels", "labels", "classifier"]

REMEDIES: dict[Need, str] = {
    "reference": "give the real images to compare with",
    "training": "give the training images",
    "pixels": "keep the generated images, not their features alone",
    "labels": "generate with class labels",
    "classifier": "use features that come from a classifier, such as features: {type: digits_classifier}",
}


@dataclass(frozen=True)
class RealSet:
    """Real images with their features, which are computed when first asked for."""

    images: Images
    extractor: FeatureExtractor

    @cached_property
    def features(self) -> Tensor:  # [N, D] float32
        return self.extractor(self.images.pixels)

    def protocol(self) -> dict[str, Any]:
        return {"count": len(self.images.pixels), "digest": digest(self.images.pixels, self.images.labels)}


@dataclass(frozen=True)
class GeneratedSet:
    """The whole generated set in index order; what no metric needs is None.

    features [N, D] float32, pixels uint8 [N, C, H, W], labels (those asked for) and predicted (the classifier's) [N] long.
    """

    features: Tensor
    pixels: Tensor | None = None
    labels: Tensor | None = None
    predicted: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that the metrics of one evaluation share; the same on every process."""

    generated: GeneratedSet
    reference: RealSet
    training: RealSet | None
    features_name: str
    seed: int

    def pool(self) -> tuple[Tensor, Tensor]:
        """Features [P, D] and labels [P] of all real images, reference and training; labels are 0 where a set has none."""
        sets = [self.reference] + ([self.training] if self.training else [])
        labels = [s.images.labels for s in sets]
        known = [given for given in labels if given is not None]
        features = torch.cat([s.features for s in sets])
        return features, torch.cat(known) if len(known) == len(labels) else torch.zeros(len(features), dtype=torch.long)


class Metric(Protocol):
    """A registered part: plain values in the constructor, one call."""

    scores: tuple[str, ...]  # the names of the scores that it gives
    needs: frozenset[Need]

    def __call__(self, evidence: Evidence) -> dict[str, dict[str, Any]]:
        """Scores by name, each a JSON-able dict with at least `value`."""


def check_needs(metrics: Sequence[Metric], available: Iterable[Need]) -> None:
    """Raise InputError, naming metric and remedy, unless everything that the metrics need is available."""
    missing = [(name_of(metric), need) for metric in metrics for need in get_args(Need) if need in metric.needs - set(available)]
    if missing:
        raise InputError("\n".join(f"metric {name!r} needs {need}: {REMEDIES[need]}, or leave the metric out." for name, need in missing))


def name_of(part: Any) -> str:
    """The name under which a part is registered, or that of its class."""
    return part.registered_as[1] if hasattr(part, "registered_as") else type(part).__name__
