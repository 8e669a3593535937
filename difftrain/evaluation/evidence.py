"""What metrics look at: features, statistics, labels of generated, reference, training samples."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from difftrain.evaluation.distances.few_samples import summary_of_rows
from difftrain.evaluation.distances.moments import GaussianSummary
from difftrain.evaluation.rows import Rows

MAIN = "features"  # the output that every extractor has
SPATIAL = "spatial"
# [distance, index] of the nearest training image, float64; of sets that were compared with them
NEAREST = "nearest"
TEXT = "text"  # features of the prompts, in the space of the images' features

Need = Literal[
    "reference images", "training", "labels", "classes", "logits", "spatial", "text", "nearest"
]


@dataclass(frozen=True)
class FeatureSet:
    """One set of samples as metrics see it, the same on every process.

    Args:
        outputs: Rows by name, row i of sample i: "features" [N, D], and whatever else the
            extractor gives ("logits", "spatial") or the evaluation was asked for ("text",
            "nearest").
        labels: Labels [N] long, if there are any.
        known: Statistics by output, of a set whose rows are not known.
        marks: Numbers [N] int64, equal for equal samples alone; None if they are not known.
    """

    outputs: Mapping[str, Rows]
    labels: Tensor | None = None
    known: Mapping[str, GaussianSummary] = field(default_factory=dict)
    marks: Tensor | None = None
    _computed: dict[str, GaussianSummary] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.outputs[MAIN]) if MAIN in self.outputs else self.known[MAIN].count

    def statistics(self, output: str = MAIN) -> GaussianSummary:
        """Return the statistics of an output's rows, computed once by all processes together.

        Collective, unless they are known.
        """
        if output in self.known:
            return self.known[output]
        if output not in self._computed:
            self._computed[output] = summary_of_rows(self.outputs[output], dealt=True)
        return self._computed[output]


@dataclass(frozen=True)
class Evidence:
    """Everything that the metrics of one evaluation share, the same on every process.

    Args:
        generated: The generated samples.
        reference: What they are compared with.
        training: What the network was trained on, if it is known.
        features_name: The name of the features.
        seed: Seed of random subsets.
        preset: The settings of the features' protocol, such as {"kid_subsets": 100}.
        floors: Floors of this reference and training set that were measured before, by what they
            depend on; None keeps none.
    """

    generated: FeatureSet
    reference: FeatureSet
    training: FeatureSet | None
    features_name: str
    seed: int
    preset: Mapping[str, Any] = field(default_factory=dict)
    floors: dict[str, dict[str, Any]] | None = None

    def floor(self, block: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the floor of a metric, measured once for each number of generated samples.

        Collective if it is measured.

        Args:
            block: What the floor depends on besides the samples: the metric and its arguments.
            measure: Measures it, such as `real_floor`.
        """
        if self.floors is None:
            return measure()
        num_training = None if self.training is None else len(self.training)
        counts = [len(self.generated), len(self.reference), num_training]
        known = [block, counts, self.seed, self.features_name, dict(self.preset)]
        key = json.dumps(known, sort_keys=True)
        if key not in self.floors:
            self.floors[key] = measure()
        return self.floors[key]

    def setting(self, own: int | None, key: str, default: int) -> int:
        """Choose a metric's setting.

        Args:
            own: What the metric says; None leaves it to the protocol.
            key: The setting's name in a preset.
            default: What holds if neither says anything.
        """
        return int(self.preset.get(key, default)) if own is None else own

    def counts(self) -> dict[str, Any]:
        """Return what a score records of the sets that it compares."""
        return {
            "count": len(self.generated),
            "reference_count": len(self.reference),
            "features": self.features_name,
        }
