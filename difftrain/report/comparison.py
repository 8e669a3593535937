"""The report of a comparison: recipes against each other over seeds, what differs between them, and their samples side by side."""

import math
from pathlib import Path

import yaml

from difftrain.evaluation.scores import badness
from difftrain.report.page import Html, card, details, element, joined, number, picture, quiet, section, shown, table, write_page
from difftrain.report.plots import dots
from difftrain.report.records import (
    BETTER,
    Record,
    better_of,
    dig,
    grids_of,
    label_of,
    mapping,
    scores_of,
    title_of,
)  # fmt: skip

Totals = dict[str, Record]  # recipe -> score -> {mean, std, values, floor}


def write_comparison(results: Record, out: Path) -> Path:
    """Writes out/report.html, self-contained, and returns its path.

    results: {"runs": [{name, seed, run, scores}, ...], "summary": {recipe: {score: {mean, std, values, floor}}},
    "differences": {recipe: {key: value}}}; the first seed that has samples shows them.
    """
    totals: Totals = {name: mapping(of_recipe) for name, of_recipe in mapping(results.get("summary")).items()}
    scores = list(dict.fromkeys(score for of_recipe in totals.values() for score in of_recipe))
    runs = [mapping(run) for run in results.get("runs") or []]
    seeds = sorted({str(run.get("seed")) for run in runs})
    out.mkdir(parents=True, exist_ok=True)
    return write_page(
        out / "report.html",
        f"Comparison: {', '.join(totals)}",
        element("header", element("h1", f"{len(totals)} recipes compared")),
        element("p", ", ".join(totals)),
        quiet(f"{len(runs)} runs, seeds {', '.join(seeds) or 'none'}"),
        section("Scores", mean_table(totals, scores), dot_cards(totals, scores)),
        section("Samples", side_by_side(totals, runs, out)),
        section("What differs", difference_table(mapping(results.get("differences")))),
        section("Runs", run_table(runs, scores) if runs else ""),
    )


def mean_table(totals: Totals, scores: list[str]) -> Html:
    if not scores:
        return quiet("No scores yet.")
    best = {score: best_of(totals, score) for score in scores}
    rows: list[list[object]] = [
        [name, *(mean_cell(mapping(of_recipe.get(score)), name == best[score]) for score in scores)] for name, of_recipe in totals.items()
    ]
    floors = [floor_of(totals, score) for score in scores]
    if any(map(math.isfinite, floors)):
        rows.append(["real against real", *map(shown, floors)])
    head = [joined(title_of(score), " ", element("small", better_of(score))) for score in scores]
    note = "Mean ± standard deviation over seeds. Bold: the best mean; others may lie within its spread."
    return joined(table(["", *head], rows), quiet(note))


def mean_cell(total: Record, best: bool) -> object:
    spread, several = number(total.get("std")), len(total.get("values") or []) > 1
    text = shown(total.get("mean")) + (f" ± {shown(spread, 2)}" if several and math.isfinite(spread) else "")
    return element("b", text) if best else text


def best_of(totals: Totals, score: str) -> str | None:
    """The recipe with the best mean; none for a score of which no better side is known."""
    means = {name: mean for name, of_recipe in totals.items() if math.isfinite(mean := number(dig(of_recipe, score, "mean")))}
    if len(means) < 2 or score not in BETTER:
        return None
    return min(means, key=lambda name: badness(score, means[name]))


def floor_of(totals: Totals, score: str) -> float:
    """Real against real, the mean where recipes have drawn it anew; NaN where none has."""
    floors = [floor for of_recipe in totals.values() if math.isfinite(floor := number(dig(of_recipe, score, "floor")))]
    return sum(floors) / len(floors) if floors else math.nan


def dot_cards(totals: Totals, scores: list[str]) -> Html:
    cards = []
    for score in scores:
        values = {name: [number(value) for value in dig(of_recipe, score, "values") or []] for name, of_recipe in totals.items()}
        drawn = dots(values, f"{score} of every seed", level=("real against real", floor_of(totals, score)))
        cards.append(card(title_of(score), drawn, "a dot is a seed, the stroke their mean"))
    return element("div", *cards, class_="cards") if cards else Html()


def side_by_side(totals: Totals, runs: list[Record], out: Path) -> Html:
    """The newest grid of each recipe's first run that has one: of the same seed, where all have it."""
    pictures = []
    for name in totals:
        for run in (run for run in runs if run.get("name") == name):
            if grids := grids_of(folder_of(run, out)):
                pictures.append(picture(grids[-1], f"{name}, seed {run.get('seed')}, {label_of(grids[-1])}", largest=800))
                break
    return element("div", *pictures, class_="side") if pictures else Html()


def folder_of(run: Record, out: Path) -> Path:
    """The run's folder, given from here or from the comparison's folder."""
    folder = Path(str(run.get("run", "")))
    return folder if folder.is_dir() else out / folder


def difference_table(differences: Record) -> Html:
    """One row a key of the recipes, one column a recipe."""
    keys = dict.fromkeys(key for of_recipe in differences.values() for key in mapping(of_recipe))
    rows = [[key, *(as_text(dig(of_recipe, key)) for of_recipe in differences.values())] for key in keys]
    return table(["", *differences], rows) if rows else Html()


def as_text(value: object) -> str:
    """As a recipe writes it."""
    if not isinstance(value, dict | list):
        return "" if value is None else str(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def run_table(runs: list[Record], scores: list[str]) -> Html:
    rows = [
        [run.get("name", ""), run.get("seed", ""), *(shown(dig(scores_of(run), score, "value")) for score in scores), run.get("run", "")]
        for run in runs
    ]
    return details("Every run", table(["recipe", "seed", *map(title_of, scores), "folder"], rows))
