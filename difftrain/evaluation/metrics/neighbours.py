"""Fidelity and diversity by nearest neighbours: precision and recall, density and coverage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from difftrain.core.registry import PositiveInt
from difftrain.evaluation.distances.neighbours import density_coverage, precision_recall
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.slots import METRICS, Metric, Scores


@METRICS.register("precision_recall")
@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """The share of each set inside the other set's k-nearest-neighbour balls.

    Precision is that of the generated samples, recall that of the reference. Both depend on the
    counts, so compare scores of equal counts.

    Args:
        neighbours: The k of the balls; None takes what the features' protocol says, else 3.

    Reference:
        Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
        Models", arXiv:1904.06991.
    """

    neighbours: PositiveInt | None = None
    scores = ("precision", "recall")
    needs = frozenset({"reference images"})
    better = "higher"

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        """Return how many samples it needs of each set."""
        return (self.neighbours or int(preset.get("pr_neighbours", 3))) + 1

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute both shares. Collective."""
        neighbours = evidence.setting(self.neighbours, "pr_neighbours", 3)
        reference, generated = evidence.reference.outputs[MAIN], evidence.generated.outputs[MAIN]
        precision, recall = precision_recall(reference, generated, neighbours, dealt=True)
        setting = {"neighbours": neighbours, **evidence.counts()}
        return {
            "precision": {"value": precision, **setting},
            "recall": {"value": recall, **setting},
        }


@METRICS.register("density_coverage")
@dataclass(frozen=True)
class DensityCoverage(Metric):
    """Generated samples per reference ball, over k, and the share of reference balls that hold any.

    Outliers move them less than precision and recall. Density is about 1 for real samples and
    exceeds 1 where generated ones crowd together.

    Args:
        neighbours: The k of the balls.

    Reference:
        Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
        arXiv:2002.09797.
    """

    neighbours: PositiveInt = 5
    scores = ("density", "coverage")
    needs = frozenset({"reference images"})
    better = "higher"

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        """Return how many samples it needs of each set."""
        return self.neighbours + 1

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute both scores. Collective."""
        reference, generated = evidence.reference.outputs[MAIN], evidence.generated.outputs[MAIN]
        density, coverage = density_coverage(reference, generated, self.neighbours, dealt=True)
        setting = {"neighbours": self.neighbours, **evidence.counts()}
        return {
            "density": {"value": density, **setting},
            "coverage": {"value": coverage, **setting},
        }
