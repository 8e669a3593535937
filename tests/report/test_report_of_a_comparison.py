"""The report of a comparison: means over seeds, the best of them, samples side by side."""

import math
import re
from pathlib import Path

import pytest
from helpers.reports import Page, decoded, grid

from difftrain.report import write_comparison
from difftrain.report.comparison import floor_of

AGREEMENT = [0.9, 0.92, 0.94]
DISTANCE_FIELDS = {"floor": 1.25, "title": "Fréchet distance", "better": "lower"}
AGREEMENT_FIELDS = {"title": "Class agreement", "better": "higher"}


def run_of(name: str, seed: int, distance: float) -> dict:
    """An entry of results.json."""
    scores = {
        "frechet_distance": {"value": distance, **DISTANCE_FIELDS},
        "class_agreement": {"value": AGREEMENT[seed], **AGREEMENT_FIELDS},
    }
    recipe, folder = f"recipes/{name}.yaml", f"runs/{name}/{seed}"
    return {"name": name, "recipe": recipe, "seed": seed, "run": folder, "scores": scores}


@pytest.fixture
def results(tmp_path: Path) -> dict:
    totals, runs = {}, []
    for name, base in [("digits_unit", 4.0), ("digits_p2", 3.0), ("digits_debiased", 3.5)]:
        values = [base, base + 0.2, base + 0.4]
        totals[name] = {
            "frechet_distance": {"mean": base + 0.2, "std": 0.2, "values": values, "floor": 1.25},
            "class_agreement": {"mean": 0.92, "std": 0.02, "values": AGREEMENT},
        }
        for seed, value in enumerate(values):
            run = run_of(name, seed, value)
            runs.append(run)
            grid(tmp_path / run["run"] / "samples" / "final.png", seed=int(100 * value))
    p2 = {"type": "p2", "gamma": 1.0}
    differences = {
        "digits_unit": {},
        "digits_p2": {"objective.weighting": p2},
        "digits_debiased": {"objective.weighting": "debiased"},
    }
    return {"runs": runs, "summary": totals, "differences": differences}


def test_comparison_shows_means_spread_floor_and_what_differs(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    for expected in [
        "3 recipes compared digits_unit, digits_p2, digits_debiased 9 runs, seeds 0, 1, 2",
        "Fréchet distance lower is better Class agreement higher is better",
        "digits_p2 3.2 ± 0.2 0.92 ± 0.02",
        "real against real 1.25 –",
        "objective.weighting {type: p2, gamma: 1.0} debiased",
    ]:
        assert expected in page.text
    assert not re.search(r"https?://", page.source)


@pytest.mark.parametrize(
    ("basis", "shown"),
    [
        ("same counts", ""),
        ("extrapolated", " (extrapolated from 75 against 70)"),
        ("fewer samples", " (75 against 70)"),
    ],
)
def test_comparison_says_the_counts_of_a_floor_and_draws_it_where_it_compares(
    results, tmp_path, basis, shown
):
    counts = {"floor_count": 75, "floor_reference_count": 70, "floor_basis": basis}
    for recipe, floor in [("digits_unit", 1.0), ("digits_p2", 1.5), ("digits_debiased", 2.0)]:
        results["summary"][recipe]["frechet_distance"] |= {"floor": floor, **counts}
    page = Page(write_comparison(results, tmp_path))
    level = floor_of(results["summary"], "frechet_distance").level

    assert f"real against real 1.5{shown} –" in page.text
    assert math.isnan(level) if basis == "fewer samples" else level == 1.5


def test_comparison_marks_the_best_mean(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    assert "<b>3.2 ± 0.2</b>" in page.source
    assert "<b>4.2 ± 0.2</b>" not in page.source
    assert page.source.count("<b>0.92 ± 0.02</b>") == 3  # equal means are all the best


@pytest.mark.parametrize(
    ("better", "best"), [("lower", 0.9), ("higher", 1.3), ("near 1", 1.05), (None, None)]
)
def test_comparison_marks_the_best_mean_in_the_direction_that_runs_state(tmp_path, better, best):
    means = {"a": 0.9, "b": 1.05, "c": 1.3}
    stated = {"value": 1.0, "title": "My score", "better": better}
    results = {
        "summary": {
            name: {"own": {"mean": mean, "values": [mean]}} for name, mean in means.items()
        },
        "runs": [{"name": "a", "seed": 0, "run": "nowhere", "scores": {"own": stated}}],
    }
    page = Page(write_comparison(results, tmp_path))

    assert re.findall("<b>([^<]*)</b>", page.source) == ([str(best)] if best else [])
    assert "My score" in page.text


def test_comparison_shows_the_samples_of_one_seed_side_by_side(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    expected = [
        tmp_path / "runs" / name / "0" / "samples" / "final.png" for name in results["summary"]
    ]
    assert [decoded(source) for source in page.pictures] == [path.read_bytes() for path in expected]


@pytest.mark.parametrize("key", ["runs", "summary", "differences"])
def test_comparison_lacking_a_part_is_written(results, tmp_path, key):
    del results[key]

    assert isinstance(Page(write_comparison(results, tmp_path / "new")), Page)


def test_comparison_of_values_that_are_no_numbers_is_written(tmp_path):
    broken = {"mean": None, "std": math.nan, "values": [None, math.inf]}
    totals = {"a<b": {"frechet_distance": broken}, "empty": {}}
    runs = [{"name": "a<b", "seed": 0, "run": "nowhere", "scores": None}]
    page = Page(write_comparison({"summary": totals, "runs": runs}, tmp_path))

    assert "a<b" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
