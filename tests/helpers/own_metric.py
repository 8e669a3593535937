"""An own metric, as a recipe's `imports:` brings it, that does what `action` says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from difftrain.evaluation.evidence import Evidence
from difftrain.evaluation.slots import METRICS, Metric, Scores

action: Callable[[], float] = lambda: 0.5  # noqa: E731  # tests replace it


@METRICS.register("own_metric")
@dataclass(frozen=True)
class OwnMetric(Metric):
    """A number from `action`, and its double, as two scores."""

    scores: ClassVar[tuple[str, ...]] = ("own_one", "own_two")
    better = "lower"

    def __call__(self, evidence: Evidence) -> Scores:
        """Return both scores."""
        value = action()
        return {"own_one": {"value": value}, "own_two": {"value": 2 * value}}
