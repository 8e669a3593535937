"""The report of one run: state and scores first, then samples, curves, recipe and environment."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftrain.core.errors import InputError
from difftrain.report.diagnostics import cards_of
from difftrain.report.fine_tuning import prompts_of
from difftrain.report.headline import Tile, facts, messages, summary, tiles_of
from difftrain.report.page import Card, Picture, Table, read_picture, write_page
from difftrain.report.records import Record, RunFiles, grids_of, label_of
from difftrain.report.score_section import (
    Memorization,
    ScoreSection,
    leaves,
    memorization,
    score_section,
)
from difftrain.report.step_scores import StepScores, step_scores
from difftrain.report.text import shown
from difftrain.report.training_section import (
    TimeShare,
    change_table,
    evaluation_share,
    noise_level_cards,
    speed_card,
    time_shares,
    training_cards,
)

MOST_EARLIER = 6  # sample grids in addition to the newest one
MOST_SKIPPED = 8  # images that could not be read


@dataclass(frozen=True)
class Samples:
    """Sample grids.

    Args:
        newest: Shown large.
        earlier: Shown small, in order of steps.
    """

    newest: Picture
    earlier: list[Picture]


@dataclass(frozen=True)
class RunPage:
    """What the template run.html shows, in the order of the page."""

    name: str
    state: str
    summary: str
    facts: dict[str, str]
    messages: list[str]
    tiles: list[Tile]
    samples: Samples | None
    prompts: str
    scores: ScoreSection
    step_scores: StepScores
    memorization: Memorization | None
    diagnostics: list[Card]
    training: list[Card]
    thinned: str
    changes: Table | None
    noise_levels: list[Card]
    speed: Card | None
    time: list[TimeShare]
    evaluation_share: str
    recipe: str
    environment: Table | None
    skipped: Table | None
    skipped_note: str


def write_report(run: Path) -> Path:
    """Write run/report.html, a self-contained page, from whatever the run folder holds by now.

    Args:
        run: The run folder, of a run in any state.

    Returns:
        The path of the page.

    Raises:
        InputError: If there is no such folder.
    """
    if not run.is_dir():
        raise InputError(f"report: there is no folder {str(run)!r}. Write the folder of a run.")
    files = RunFiles.read(run)
    return write_page(run / "report.html", "run.html", page_of(files))


def page_of(files: RunFiles) -> RunPage:
    """Return what the template shows of a run.

    Args:
        files: The run folder's content.
    """
    evaluation = files.latest_evaluation
    return RunPage(
        name=files.name,
        state=files.state,
        summary=summary(files.recipe),
        facts=facts(files),
        messages=messages(files),
        tiles=tiles_of(evaluation),
        samples=samples(files),
        prompts=prompts_of(files.recipe),
        scores=score_section(files),
        step_scores=step_scores(files.scored),
        memorization=memorization(evaluation, files.folder),
        diagnostics=cards_of(files.diagnostics),
        training=training_cards(files.log, files.validation),
        thinned=thinned(files.every),
        changes=change_table(files.changes),
        noise_levels=noise_level_cards(files),
        speed=speed_card(files.log),
        time=time_shares(files.seconds),
        evaluation_share=evaluation_share(files.in_loop),
        recipe=text_of(files.folder / "recipe.yaml"),
        environment=leaves(files.environment),
        skipped=skipped_table(files.skipped),
        skipped_note=skipped_note(len(files.skipped)),
    )


def samples(files: RunFiles) -> Samples | None:
    """Return the newest sample grid and up to six earlier ones, evenly spaced; None without any.

    samples/final.png counts only while the training is complete: a run that continues leaves the
    file of its earlier end behind.

    Args:
        files: The run folder's content.
    """
    grids = grids_of(files.folder, with_final=files.state in ("finished", "trained"))
    if not grids:
        return None
    *earlier, newest = grids
    chosen: list[Path] = []
    if earlier:
        places = np.linspace(0, len(earlier) - 1, MOST_EARLIER)
        chosen = [earlier[i] for i in sorted({round(place) for place in places})]
    small = [read_picture(path, label_of(path), largest=320) for path in chosen]
    return Samples(read_picture(newest, label_of(newest), largest=1200), small)


def thinned(every: int) -> str:
    """Return that a long log is not drawn in full; empty if it is."""
    return f"The log is long: the charts show one in {every:,} logged steps." if every > 1 else ""


def text_of(path: Path) -> str:
    """Return the text of a file; empty if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def skipped_table(records: list[Record]) -> Table | None:
    """Return the first images that could not be read; None without any."""
    rows = []
    for record in records[:MOST_SKIPPED]:
        texts = [str(record.get(key, "")) for key in ("data", "name", "reason")]
        rows.append([*texts, shown(record.get("step"))])
    return Table(["data set", "image", "reason", "step"], rows) if rows else None


def skipped_note(num: int) -> str:
    """Return how many images could not be read."""
    text = f"Images that could not be read: {num:,}."
    return f"{text} The first {MOST_SKIPPED}:" if num > MOST_SKIPPED else text
