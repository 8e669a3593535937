"""The real samples behind scores: reference, training samples, and what is compared with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from difftrain.evaluation.agreement import together
from difftrain.evaluation.distances.nearest import NearestTraining
from difftrain.evaluation.evidence import MAIN, NEAREST, SPATIAL, FeatureSet
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.reference import ReferenceStatistics
from difftrain.evaluation.slots import FeatureExtractor, Metric
from difftrain.evaluation.sources.base import Source, block_samples
from difftrain.evaluation.sources.shuffled import ShuffledPart


@dataclass(frozen=True)
class RealSet:
    """A set of real samples, and what a protocol says of it."""

    features: FeatureSet
    described: dict[str, Any]


@dataclass
class RealSets:
    """Extracts the real samples that metrics look at, each set once.

    Collective: every process calls it.

    Args:
        reference: What samples are compared with.
        training: What the network was trained on; None if it is not known.
        features: What turns samples into features.
        base: The folder that holds the folders of rows.
    """

    reference: Source | ReferenceStatistics
    training: Source | None
    features: FeatureExtractor
    base: Path
    _found: dict[Any, RealSet] = field(default_factory=dict)
    _compared: NearestTraining | None = None
    _identity: dict[str, Any] | None = None  # of the training samples

    def reference_set(self, metrics: Sequence[Metric]) -> RealSet:
        """Return the features of the reference, and its nearest training images if wanted."""
        source = self.reference
        if isinstance(source, ReferenceStatistics):
            return RealSet(FeatureSet({}, known=source.by_output), source.protocol)
        outputs = outputs_of(metrics)
        found = self._rows_of("reference", source, outputs)
        compared = self.nearest_training(metrics)
        if compared is None:
            return found
        # In a folder of their own: features do not depend on what they are compared with.
        distances = self._rows_of("compared", source, [], compared).features.outputs
        features = replace(found.features, outputs={**found.features.outputs, **distances})
        return RealSet(features, found.described)

    def training_set(
        self, metrics: Sequence[Metric], num_generated: int, num_reference: int
    ) -> RealSet | None:
        """Return the features of as many training samples as metrics want; None if of none."""
        if self.training is None or isinstance(self.reference, ReferenceStatistics):
            return None
        outputs = outputs_of(metrics)
        if any("training" in metric.needs for metric in metrics):
            return self._rows_of("training", self.training, outputs)
        wanted = [metric.num_real(num_generated, num_reference) for metric in metrics]
        missing = max(wanted, default=0) - num_reference
        if missing <= 0:
            return None
        return self._rows_of("training", ShuffledPart(self.training, missing), outputs)

    def _rows_of(
        self,
        what: str,
        source: Source,
        outputs: Sequence[str],
        compared: NearestTraining | None = None,
    ) -> RealSet:
        """Return the rows of real samples, found once."""
        known = (what, tuple(outputs), len(source))
        if known not in self._found:
            key = self.training_key(compared)
            extraction = Extraction(source, self.features, outputs, self.base, what, compared, key)
            found = extraction()
            self._found[known] = RealSet(found, extraction.content())
        return self._found[known]

    def nearest_training(self, metrics: Sequence[Metric]) -> NearestTraining | None:
        """Return what finds the nearest training images, if a metric needs it."""
        if self.training is None or not any(NEAREST in metric.needs for metric in metrics):
            return None
        if self._compared is None:
            blocks = block_samples(self.training)
            device = self.features.device
            self._compared = together(lambda: NearestTraining(blocks, device))
        return self._compared

    def training_key(self, compared: NearestTraining | None) -> dict[str, Any]:
        """Return what rows depend on that hold distances to training images. Collective.

        Args:
            compared: What finds these; None where they are not looked for.
        """
        if compared is None or self.training is None:
            return {}
        if self._identity is None:
            self._identity = self.training.identity()
        return {"training": self._identity}


def outputs_of(metrics: Sequence[Metric]) -> list[str]:
    """Return the outputs of an extractor that metrics look at."""
    outputs = [MAIN]
    if any("logits" in metric.needs for metric in metrics):
        outputs.append("logits")
    if any(SPATIAL in metric.needs for metric in metrics):
        outputs.append(SPATIAL)
    return outputs
