"""Compares the scores of a digits run with the values that it must reach.

python scripts/digits_bars.py RECIPE [KEY=VALUE ...] [--strict]

Reads evaluation.json and environment.json of the recipe's run folder. With --strict the exit code
is 1 if a value is missed.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Bar:
    """A score and what it must reach."""

    name: str
    value: float
    required: str
    is_reached: bool


def find_output(recipe: Path, overrides: list[str]) -> Path:
    """Return the run folder of a recipe; the last `output=` of the overrides wins."""
    outputs = [text for text in overrides if text.startswith("output=")]
    if outputs:
        return Path(outputs[-1].removeprefix("output="))
    return Path(yaml.safe_load(recipe.read_text())["output"])


def make_bars(scores: dict[str, Any], seconds: dict[str, float]) -> list[Bar]:
    """Return the bars of a run.

    Args:
        scores: The scores in its evaluation.json.
        seconds: The seconds of each stage in its environment.json.
    """
    distance = scores["frechet_distance"]["value"]
    largest_distance = 3 * scores["frechet_distance"]["floor"]
    agreement = scores["class_agreement"]["value"]
    nearest = scores["nearest_neighbour_ratio"]["value"]
    total = sum(seconds.values())
    return [
        Bar(
            "Frechet distance to held-out digits",
            distance,
            f"at most {largest_distance:.3g} (3 x real against real)",
            distance <= largest_distance,
        ),
        Bar("classified as the digit asked for", agreement, "at least 0.95", agreement >= 0.95),
        Bar(
            "nearest training digit, against held-out",
            nearest,
            "at least 0.8 (not copies)",
            nearest >= 0.8,
        ),
        Bar("seconds, without program start-up", total, "under 300 on two cores", total < 300),
    ]


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a value is missed")
    # KEY=VALUE, and options of `difftrain train` that scripts/quickstart.sh passes on
    given, others = parser.parse_known_args()
    run = find_output(given.recipe, others)
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    seconds = json.loads((run / "environment.json").read_text())["seconds"]
    bars = make_bars(scores, seconds)
    print(f"\n{'':46}{'value':>8}   bar")
    for bar in bars:
        verdict = "ok" if bar.is_reached else "MISSED"
        print(f"{bar.name:<46}{bar.value:>8.3g}   {bar.required:<40}{verdict}")
    print(f"\nlook at  {run / 'report.html'}\n         {run / 'samples' / 'final.png'}")
    is_good = all(bar.is_reached for bar in bars)
    return 1 if given.strict and not is_good else 0


if __name__ == "__main__":
    sys.exit(main())
