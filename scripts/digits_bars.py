"""The digits run beside what it has to reach: python scripts/digits_bars.py RECIPE [KEY=VALUE ...] [--strict].

Reads evaluation.json and environment.json of the recipe's run folder. With --strict the exit code is 1 if a bar is missed.
"""

import json
import sys
from pathlib import Path

import yaml


def output_of(recipe: str, overrides: list[str]) -> Path:
    given = [o.removeprefix("output=") for o in overrides if o.startswith("output=")]
    return Path(given[-1] if given else yaml.safe_load(Path(recipe).read_text())["output"])


def main(recipe: str, *arguments: str) -> int:
    overrides = [a for a in arguments if "=" in a]
    run = output_of(recipe, overrides)
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    seconds = json.loads((run / "environment.json").read_text())["seconds"]
    distance, total = scores["frechet_distance"], sum(seconds.values())
    rows = [
        (
            "Frechet distance to held-out digits",
            distance["value"],
            f"at most {2 * distance['floor']:.3g} (2 x real against real)",
            distance["value"] <= 2 * distance["floor"],
        ),
        (
            "drawn as the digit asked for",
            scores["class_agreement"]["value"],
            "at least 0.95",
            scores["class_agreement"]["value"] >= 0.95,
        ),
        (
            "nearest training digit, against held-out",
            scores["nearest_neighbour_ratio"]["value"],
            "at least 0.8 (not copies)",
            scores["nearest_neighbour_ratio"]["value"] >= 0.8,
        ),
        (
            "seconds, start-up of the program not counted",
            total,
            "under 300 on two cores",
            total < 300,
        ),
    ]
    print(f"\n{'':46}{'value':>8}   bar")
    for name, value, bar, held in rows:
        print(f"{name:<46}{value:>8.3g}   {bar:<40}{'ok' if held else 'MISSED'}")
    print(f"\nlook at  {run / 'report.html'}\n         {run / 'samples' / 'final.png'}")
    return 1 if "--strict" in arguments and not all(held for *_, held in rows) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
