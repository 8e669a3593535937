"""Fidelity and diversity by nearest neighbours: precision and recall, density and coverage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from difftrain.evaluation.evidence import Evidence, Need
from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.metrics.common import Scores
from difftrain.evaluation.metrics.kernel import chosen, counts
from difftrain.evaluation.neighbours import density_coverage, precision_recall
from difftrain.registry import METRICS, PositiveInt


@METRICS.register("precision_recall")
@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of each set inside the other's k-nearest-neighbour balls; Kynkaanniemi et al. 2019, arXiv:1904.06991.

    neighbours: left out, those of the features' protocol, else the paper's 3. Both depend on the counts: compare equal ones.
    """

    neighbours: PositiveInt | None = None
    scores: ClassVar[tuple[str, ...]] = ("precision", "recall")
    needs: ClassVar[frozenset[Need]] = frozenset({"reference images"})

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        return (self.neighbours or int(preset.get("pr_neighbours", 3))) + 1

    def __call__(self, evidence: Evidence) -> Scores:
        neighbours = chosen(self.neighbours, evidence, "pr_neighbours", 3)
        found = precision_recall(evidence.reference.outputs[FEATURES], evidence.generated.outputs[FEATURES], neighbours, dealt=True)
        setting = {"neighbours": neighbours, **counts(evidence)}
        return {name: {"value": value, **setting} for name, value in zip(self.scores, found, strict=True)}


@METRICS.register("density_coverage")
@dataclass(frozen=True)
class DensityCoverage:
    """Generated images per reference ball, over k, and the share of reference balls that hold any; Naeem et al. 2020, arXiv:2002.09797.

    Less moved by outliers than precision and recall. Density can exceed 1.
    """

    neighbours: PositiveInt = 5
    scores: ClassVar[tuple[str, ...]] = ("density", "coverage")
    needs: ClassVar[frozenset[Need]] = frozenset({"reference images"})

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        return self.neighbours + 1

    def __call__(self, evidence: Evidence) -> Scores:
        found = density_coverage(evidence.reference.outputs[FEATURES], evidence.generated.outputs[FEATURES], self.neighbours, dealt=True)
        setting = {"neighbours": self.neighbours, **counts(evidence)}
        return {name: {"value": value, **setting} for name, value in zip(self.scores, found, strict=True)}
