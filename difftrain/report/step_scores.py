"""The scores of several steps, as `difftrain evaluate --steps` finds them."""

from dataclasses import dataclass

from difftrain.report.page import Card
from difftrain.report.records import Record, by_step
from difftrain.report.score_section import conditions, score_curves


@dataclass(frozen=True)
class StepScores:
    """Scores that were taken at several steps of a trained run.

    Args:
        curves: Each score over the steps; none where fewer than two steps can be compared.
        not_drawn: How many evaluations are not comparable with the latest; empty if all are.
    """

    curves: list[Card]
    not_drawn: str


def step_scores(records: list[Record]) -> StepScores:
    """Return the curves of the evaluations that are comparable with the latest one.

    Args:
        records: The lines of scores.jsonl, in the order of time.
    """
    if not records:
        return StepScores([], "")
    latest = conditions(records[-1])
    comparable = by_step([record for record in records if conditions(record) == latest])
    if len(comparable) < 2:
        return StepScores([], "")
    others = sum(conditions(record) != latest for record in records)
    not_drawn = ""
    if others:
        not_drawn = f"{others} of {len(records)} evaluations used a different protocol: not drawn."
    return StepScores(score_curves(comparable), not_drawn)
