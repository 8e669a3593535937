"""Scores of metrics, and the failures of some of them, agreed on by all processes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.processes import process_index
from difftrain.core.registry import registered_name
from difftrain.evaluation.agreement import AgreedError, Failure, agree
from difftrain.evaluation.evidence import Evidence
from difftrain.evaluation.slots import Metric, Scores

logger = wing_logger(__name__)


def compute_scores(
    metrics: Sequence[Metric], evidence: Evidence
) -> tuple[Scores, dict[str, Failure]]:
    """Compute the scores of all metrics. Collective.

    Args:
        metrics: The metrics, no two of which give one score.
        evidence: What they look at.

    Returns:
        The scores, and by name why others could not be computed, the same on all processes.
    """
    scores: Scores = {}
    failures: dict[str, Failure] = {}
    for metric in metrics:
        try:
            scores |= agreed_scores(metric, evidence)
        except AgreedError as error:
            failures |= dict.fromkeys(metric.scores, error.failure)
            if not error.failure.is_input and error.rank == process_index():
                logger.warning(f"metric {registered_name(metric)!r} failed", exc_info=error)
    return scores, failures


def agreed_scores(metric: Metric, evidence: Evidence) -> Scores:
    """Compute the scores of a metric. Collective.

    Raises:
        AgreedError: On every process, if the metric fails on any of them.
    """
    scores: Scores = {}
    problem: Exception | None = None
    try:
        scores = described_scores(metric, metric(evidence))
    except AgreedError:  # every process knows of it
        raise
    except Exception as error:
        problem = error
    agree(problem)
    return scores


def described_scores(metric: Metric, found: Scores) -> Scores:
    """Add to each score which way it is better, and its title.

    Raises:
        InputError: If the scores are not those that the metric names.
    """
    if set(found) != set(metric.scores):
        raise InputError(
            f"metric {registered_name(metric)!r} returned the scores {sorted(found)}, but its "
            f"`scores` are {sorted(metric.scores)}. Return what it names."
        )
    described: Scores = {}
    for name, score in found.items():
        if "value" not in score:
            raise InputError(
                f"metric {registered_name(metric)!r} returned {name} without a `value`. Return "
                f"{{{name!r}: {{'value': ...}}}}."
            )
        broken = not_finite(score)
        if broken:
            raise InputError(
                f"metric {registered_name(metric)!r} gave {broken} of {name} that is not finite. "
                "Look at its arguments, and at the features."
            )
        about = {"better": metric.better_of(name), "title": metric.title_of(name)}
        described[name] = {**score, **about}
    return described


def not_finite(found: Any, name: str = "") -> str:
    """Return the name of the first number in plain data that is not finite; empty without one."""
    if isinstance(found, float) and not math.isfinite(found):
        return name
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(found, Mapping):
        inner = found.items()
    elif isinstance(found, (list, tuple)):
        inner = enumerate(found)
    for key, value in inner:
        broken = not_finite(value, f"{name}.{key}".lstrip("."))
        if broken:
            return broken
    return ""
