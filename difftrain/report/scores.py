"""Scores as evaluation.json states them, with titles, directions, and reasons for missing ones."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from difftrain.report.records import Record, dig, mapping
from difftrain.report.text import number, shown


@dataclass(frozen=True)
class Direction:
    """Which values of a score are better.

    Args:
        note: The direction in words.
        badness: Turns a value so that smaller is better.
    """

    note: str
    badness: Callable[[float], float]


# Bases of a floor on which it stands beside the score as its level
COMPARABLE = ("same counts", "extrapolated")
DIRECTIONS = {
    "lower": Direction("lower is better", lambda value: value),
    "higher": Direction("higher is better", lambda value: -value),
    "near 1": Direction("near 1 is best", lambda value: abs(value - 1)),
}


@dataclass(frozen=True)
class Score:
    """One score of an evaluation.

    Args:
        title: The title that the file states, otherwise the name.
        direction: Which values are better; None where the file does not state it.
        value: The score, NaN if it is not a number.
        floor: The same score of real samples against real samples, NaN if there is none.
        floor_std: Standard deviation of the floor, NaN if there is none.
        floor_basis: How the floor compares with the score, as the file states it.
        floor_counts: Samples on both sides of the floor, NaN where the file does not state them.
        ratio: The value over the floor, NaN where the file states none.
        features: The feature extractor, if the file names one.
    """

    title: str
    direction: Direction | None
    value: float
    floor: float
    floor_std: float
    floor_basis: str
    floor_counts: tuple[float, float]
    ratio: float
    features: str

    @classmethod
    def of(cls, name: str, stated: object) -> "Score":
        """Read a score.

        Args:
            name: The name of the score.
            stated: An object with a value, or the bare value.
        """
        fields = stated if isinstance(stated, dict) else {"value": stated}
        return cls(
            title=str(fields.get("title") or name),
            direction=DIRECTIONS.get(str(fields.get("better"))),
            value=number(fields.get("value")),
            floor=number(fields.get("floor")),
            floor_std=number(fields.get("floor_std")),
            floor_basis=str(fields.get("floor_basis") or ""),
            floor_counts=(
                number(fields.get("floor_count")),
                number(fields.get("floor_reference_count")),
            ),
            ratio=number(fields.get("floor_ratio")),
            features=str(fields.get("features") or ""),
        )

    @property
    def note(self) -> str:
        """The direction in words; empty where it is not known."""
        return self.direction.note if self.direction else ""

    @property
    def level(self) -> float:
        """The floor where it compares with the value; NaN otherwise."""
        return self.floor if self.floor_basis in COMPARABLE else math.nan

    @property
    def floor_note(self) -> str:
        """The floor's counts in brackets; empty where they are the score's or not known."""
        if not all(map(math.isfinite, self.floor_counts)) or self.floor_basis == "same counts":
            return ""
        counts = " against ".join(map(shown, self.floor_counts))
        if self.floor_basis == "extrapolated":
            return f" (extrapolated from {counts})"
        return f" ({counts})"

    @property
    def real_against_real(self) -> str:
        """The floor with its standard deviation, and with its counts where they differ."""
        text = shown(self.floor)
        if math.isfinite(self.floor_std):
            text += f" ± {shown(self.floor_std, 2)}"
        return text + self.floor_note


def scores_of(evaluation: Record) -> dict[str, Score]:
    """Return the scores of an evaluation by name."""
    stated = mapping(evaluation.get("scores"))
    return {name: Score.of(name, score) for name, score in stated.items()}


def value_of(evaluation: Record, name: str) -> float:
    """Return the value of one score; NaN if the evaluation does not have it."""
    return Score.of(name, dig(evaluation, "scores", name)).value


def reasons(evaluation: Record, key: str) -> Mapping[str, str]:
    """Return why scores are missing, by the name of the score.

    Args:
        evaluation: An evaluation.
        key: "failed" or "left_out".
    """
    return {name: str(reason or "") for name, reason in mapping(evaluation.get(key)).items()}


def titles_in(evaluations: list[Record]) -> dict[str, str]:
    """Return the title of each score that any of the evaluations holds, by name."""
    titles: dict[str, str] = {}
    for evaluation in evaluations:
        titles |= {name: score.title for name, score in scores_of(evaluation).items()}
    return titles
