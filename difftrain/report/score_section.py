"""The sections "Scores" and "Memorization" of a run's report."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from difftrain.report.charts import StepCurves
from difftrain.report.page import Card, Picture, Table, read_picture
from difftrain.report.records import Record, RunFiles, best_step, dig, mapping
from difftrain.report.scores import Score, reasons, scores_of, titles_in, value_of
from difftrain.report.style import Level
from difftrain.report.text import MISSING, flat, number, shown

MEMORIZATION = "nearest_neighbour_ratio"


@dataclass(frozen=True)
class ScoreSection:
    """The scores of a run.

    Args:
        table: The scores beside real against real; None without scores.
        weights: Which weights were scored.
        pending: What to do if the final scores are not computed yet; empty otherwise.
        failed: Scores that failed, with reasons.
        left_out: Scores that the recipe does not ask for and that cannot be computed, with reasons.
        curves: Each score over training.
        not_drawn: How many evaluations are not comparable with the latest; empty if all are.
        protocol: The protocol of the evaluation.
    """

    table: Table | None
    weights: str
    pending: str
    failed: Table | None
    left_out: Table | None
    curves: list[Card]
    not_drawn: str
    protocol: Table | None


@dataclass(frozen=True)
class Memorization:
    """Whether generated samples are copies of training samples.

    Args:
        text: The ratio in words.
        picture: The generated images nearest to the training set, if they were saved.
    """

    text: str
    picture: Picture | None


def score_section(files: RunFiles) -> ScoreSection:
    """Return the section "Scores".

    Args:
        files: The run folder's content.
    """
    evaluation = files.latest_evaluation
    comparable = [
        record for record in files.in_loop if conditions(record) == conditions(files.in_loop[-1])
    ]
    num, others = len(files.in_loop), len(files.in_loop) - len(comparable)
    not_drawn = ""
    if others:
        not_drawn = f"{others} of {num} evaluations used a different protocol and are not drawn."
    pending = ""
    if files.awaits_scores:
        pending = (
            "The final weights have no scores yet. If the command has ended, run the same command "
            "again: it computes just the scores and does not train again."
        )
    return ScoreSection(
        table=score_table(evaluation),
        weights=weights_note(evaluation),
        pending=pending,
        failed=failed_table(files),
        left_out=left_out_table(evaluation),
        curves=score_curves(comparable or [evaluation]),
        not_drawn=not_drawn,
        protocol=leaves(mapping(evaluation.get("protocol"))),
    )


def score_table(evaluation: Record) -> Table | None:
    """Return the scores beside real against real; None without scores."""
    scores = scores_of(evaluation)
    if not scores:
        return None
    head = ["score", "value", "real against real", "ratio", "", "features", "samples"]
    num_samples = shown(evaluation.get("num_samples"))
    return Table(head, [[*score_row(score), num_samples] for score in scores.values()])


def score_row(score: Score) -> list[str]:
    """Return the cells of a score."""
    ratio = MISSING
    if math.isfinite(score.ratio):
        ratio = f"{score.ratio:.3g} \N{MULTIPLICATION SIGN}"
    value, floor = shown(score.value), score.real_against_real
    return [score.title, value, floor, ratio, score.note, score.features]


def weights_note(evaluation: Record) -> str:
    """Return which weights an evaluation scored; empty without an evaluation."""
    if not evaluation:
        return ""
    weights = evaluation.get("weights", "not stated")
    return f"Step {shown(evaluation.get('step'))}, weights: {weights}."


def failed_table(files: RunFiles) -> Table | None:
    """Return the scores that failed, at the end of the run and within training; None without any.

    Args:
        files: The run folder's content.
    """
    titles = titles_in([*files.in_loop, files.evaluation])
    rows = []
    for name, reason in reasons(files.evaluation, "failed").items():
        step = shown(files.evaluation.get("step"))
        rows.append([titles.get(name, name), f"final, step {step}", reason])

    # Within training a score may fail at many steps: one row says how often, and why the last time.
    counts: dict[str, int] = {}
    latest: dict[str, str] = {}
    for record in files.in_loop:
        for name, reason in reasons(record, "failed").items():
            counts[name] = counts.get(name, 0) + 1
            latest[name] = reason
    for name, count in counts.items():
        when = f"in training, {count} of {len(files.in_loop)}"
        rows.append([titles.get(name, name), when, latest[name]])
    return Table(["score", "evaluation", "reason"], rows) if rows else None


def left_out_table(evaluation: Record) -> Table | None:
    """Return the scores that were left out of an evaluation; None without any."""
    titles = titles_in([evaluation])
    left_out = reasons(evaluation, "left_out")
    rows = [[titles.get(name, name), reason] for name, reason in left_out.items()]
    return Table(["score", "reason"], rows) if rows else None


def score_curves(evaluations: list[Record]) -> list[Card]:
    """Return each score over training, with its floor where that compares.

    Args:
        evaluations: Comparable evaluations in order of steps.
    """
    steps = [number(record.get("step")) for record in evaluations]
    best = best_step(evaluations)
    latest: dict[str, Score] = {}
    for record in evaluations:
        latest |= scores_of(record)
    cards = []
    for name, score in latest.items():
        values = [value_of(record, name) for record in evaluations]
        level = Level("real against real", score.level)
        alt = f"{score.title} over training"
        chart = StepCurves(alt, {"generated": (steps, values)}, level=level, mark=best)
        cards.append(Card(score.title, chart, score.note))
    return cards


def conditions(record: Record) -> tuple[object, ...]:
    """Return what must agree for two evaluations to be comparable."""
    return record.get("protocol_digest"), record.get("protocol"), record.get("weights")


def memorization(evaluation: Record, folder: Path) -> Memorization | None:
    """Return the section "Memorization"; None where it was not measured.

    Args:
        evaluation: The latest evaluation.
        folder: The run folder.
    """
    score = mapping(dig(evaluation, "scores", MEMORIZATION))
    if not score:
        return None
    generated, reference = shown(score.get("generated")), shown(score.get("reference"))
    text = (
        f"Generated samples are {shown(score.get('value'))} times as far from their nearest "
        f"training sample as held-out samples are (mean distance {generated} against {reference}). "
        "A ratio far below 1 means that the model copies training samples."
    )
    file = folder / "samples" / "nearest.png"
    if not file.exists():
        return Memorization(text, None)
    caption = (
        "Generated samples nearest to the training set, each above its nearest training sample"
    )
    return Memorization(text, read_picture(file, caption, largest=1200))


def leaves(nested: Record) -> Table | None:
    """Return nested mappings as a table of dotted keys and values; None if there are none."""
    if not nested:
        return None
    rows = []
    for key, value in flat(nested).items():
        rows.append([key, value if isinstance(value, str) else json.dumps(value)])
    return Table(["", ""], rows)
