"""The report of a comparison: the scores of recipes over seeds, their differences and samples."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from difftrain.report.charts import Dots
from difftrain.report.page import Card, Picture, Table, read_picture, write_page
from difftrain.report.records import Record, dig, grids_of, label_of, mapping
from difftrain.report.scores import Score, scores_of, value_of
from difftrain.report.style import Level
from difftrain.report.text import number, numbers, recipe_value, shown

Totals = dict[str, Record]  # recipe -> score -> {mean, std, values, floor, floor_basis, ...}


@dataclass(frozen=True)
class MeanCell:
    """The mean of a score over seeds.

    Args:
        text: Mean and standard deviation.
        is_best: Whether no other recipe has a better mean.
    """

    text: str
    is_best: bool


@dataclass(frozen=True)
class MeanTable:
    """The mean scores of each recipe.

    Args:
        scores: The scores, one a column.
        rows: One row for each recipe.
        floors: Real against real, by score; empty if no score has a floor.
    """

    scores: list[Score]
    rows: dict[str, list[MeanCell]]
    floors: list[str]


@dataclass(frozen=True)
class ComparisonPage:
    """What the template comparison.html shows, in the order of the page."""

    recipes: list[str]
    num_runs: int
    seeds: str
    means: MeanTable | None
    dots: list[Card]
    samples: list[Picture]
    differences: Table | None
    runs: Table | None


def write_comparison(results: Record, out: Path) -> Path:
    """Write out/report.html, a self-contained page.

    Args:
        results: {"runs": [{name, seed, run, scores}, ...],
            "summary": {recipe: {score: {mean, std, values, and the floor with basis and counts}}},
            "differences": {recipe: {key: value}}}. Parts may be missing. Titles and directions of
            scores are those that the scores of the runs state.
        out: The folder of the page, which is made if it is missing.

    Returns:
        The path of the page.
    """
    summary = mapping(results.get("summary"))
    totals = {name: mapping(of_recipe) for name, of_recipe in summary.items()}
    runs = [mapping(run) for run in results.get("runs") or []]
    scores = known_scores(totals, runs)
    seeds = sorted({str(run.get("seed")) for run in runs})
    page = ComparisonPage(
        recipes=list(totals),
        num_runs=len(runs),
        seeds=", ".join(seeds) or "none",
        means=mean_table(totals, scores),
        dots=dot_cards(totals, scores),
        samples=side_by_side(list(totals), runs, out),
        differences=difference_table(mapping(results.get("differences"))),
        runs=run_table(runs, scores),
    )
    return write_page(out / "report.html", "comparison.html", page)


def known_scores(totals: Totals, runs: list[Record]) -> dict[str, Score]:
    """Return each score of the summary by name, with the title and direction that a run states."""
    scores: dict[str, Score] = {}
    for of_recipe in totals.values():
        for name in of_recipe:
            scores.setdefault(name, Score.of(name, None))
    for run in runs:
        for name, score in scores_of(run).items():
            if name in scores and scores[name].direction is None:
                scores[name] = score
    return scores


def mean_table(totals: Totals, scores: dict[str, Score]) -> MeanTable | None:
    """Return the mean of each score for each recipe; None without scores."""
    if not scores:
        return None
    best = {name: best_mean(totals, name, score) for name, score in scores.items()}
    rows = {}
    for recipe, of_recipe in totals.items():
        cells = []
        for name in scores:
            total = mapping(of_recipe.get(name))
            cells.append(MeanCell(mean_text(total), number(total.get("mean")) == best[name]))
        rows[recipe] = cells
    floors = [floor_of(totals, name) for name in scores]
    texts = []
    if any(math.isfinite(floor.floor) for floor in floors):
        texts = [shown(floor.floor) + floor.floor_note for floor in floors]
    return MeanTable(list(scores.values()), rows, texts)


def mean_text(total: Record) -> str:
    """Return a mean with its standard deviation, if there is more than one seed."""
    spread, values = number(total.get("std")), total.get("values") or []
    text = shown(total.get("mean"))
    if len(values) > 1 and math.isfinite(spread):
        text += f" ± {shown(spread, 2)}"
    return text


def best_mean(totals: Totals, name: str, score: Score) -> float:
    """Return the best mean of a score over recipes.

    Returns:
        The mean; NaN if the direction of the score is not known, or fewer than two recipes have it.
    """
    means = [number(dig(of_recipe, name, "mean")) for of_recipe in totals.values()]
    finite = [mean for mean in means if math.isfinite(mean)]
    if score.direction is None or len(finite) < 2:
        return math.nan
    return min(finite, key=score.direction.badness)


def floor_of(totals: Totals, name: str) -> Score:
    """Return a score with the floor of all recipes, which may each have measured it.

    Returns:
        The score of the first recipe that has a floor, with the mean of all floors; a score
        without a floor if there is none.
    """
    found = [Score.of(name, of_recipe.get(name)) for of_recipe in totals.values()]
    measured = [score for score in found if math.isfinite(score.floor)]
    if not measured:
        return Score.of(name, None)
    mean = sum(score.floor for score in measured) / len(measured)
    return replace(measured[0], floor=mean)


def dot_cards(totals: Totals, scores: dict[str, Score]) -> list[Card]:
    """Return a chart of each score with the value of every seed."""
    cards = []
    for name, score in scores.items():
        values = {}
        for recipe, of_recipe in totals.items():
            values[recipe] = numbers(dig(of_recipe, name, "values"))
        level = Level("real against real", floor_of(totals, name).level)
        chart = Dots(f"{score.title} of every seed", values, level)
        cards.append(Card(score.title, chart, "a dot is a seed, the stroke is their mean"))
    return cards


def side_by_side(recipes: list[str], runs: list[Record], out: Path) -> list[Picture]:
    """Return the newest sample grid of each recipe's first run that has one.

    These are grids of the same seed if all runs have one.

    Args:
        recipes: Names of the recipes.
        runs: All runs in order of seeds.
        out: The folder of the comparison.
    """
    pictures = []
    for recipe in recipes:
        for run in runs:
            grids = grids_of(folder_of(run, out)) if run.get("name") == recipe else []
            if grids:
                caption = f"{recipe}, seed {run.get('seed')}, {label_of(grids[-1])}"
                pictures.append(read_picture(grids[-1], caption, largest=800))
                break
    return pictures


def folder_of(run: Record, out: Path) -> Path:
    """Return the folder of a run, whose path is relative to here or to the comparison's folder."""
    folder = Path(str(run.get("run", "")))
    return folder if folder.is_dir() else out / folder


def difference_table(differences: Record) -> Table | None:
    """Return one row for each key that differs, one column for each recipe; None without any."""
    keys: dict[str, None] = {}
    for of_recipe in differences.values():
        keys |= dict.fromkeys(mapping(of_recipe))
    rows = []
    for key in keys:
        values = [dig(of_recipe, key) for of_recipe in differences.values()]
        rows.append([key, *("" if value is None else recipe_value(value) for value in values)])
    return Table(["", *differences], rows) if rows else None


def run_table(runs: list[Record], scores: dict[str, Score]) -> Table | None:
    """Return the scores of every run; None without runs."""
    titles = [score.title for score in scores.values()]
    rows = []
    for run in runs:
        values = [shown(value_of(run, name)) for name in scores]
        rows.append(
            [str(run.get("name", "")), str(run.get("seed", "")), *values, str(run.get("run", ""))]
        )
    return Table(["recipe", "seed", *titles, "folder"], rows) if rows else None
