"""Several recipes over several seeds: trained, evaluated, and set side by side.

`difftrain compare RECIPE RECIPE ... --seeds 0,1,2 --out DIR` writes results.json and report.html. Runs resume: the same command
goes on where it was stopped.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difftrain.entry import DONE, guarded, leave, say
from difftrain.evaluation.evaluator import comparable
from difftrain.evaluation.presets import check_comparable
from difftrain.plan import Plan
from difftrain.recipe import Recipe, load
from difftrain.registry import InputError, dump
from difftrain.report import write_comparison
from difftrain.runlog import write_atomically
from difftrain.sample import made
from difftrain.train import train


def compare(recipes: Sequence[str], seeds: Sequence[int], out: str, overrides: Sequence[str] = ()) -> int:
    """Train each recipe with each seed below `out`, then write what they score. Returns the first exit code that is not 0."""
    names = [Path(recipe).stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise InputError(f"compare: two recipes have one file name ({', '.join(names)}). Rename one.")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {','.join(map(str, seeds))}: a seed is written twice. Keep one.")
    loaded = [load(recipe, overrides) for recipe in recipes]
    for recipe, name in zip(loaded, names, strict=True):
        if recipe.evaluation is None:
            raise InputError(f"compare: the recipe {name} has no evaluation: block, so there is nothing to compare. Add one.")
        check_comparable(scored_by(loaded[0]), scored_by(recipe), f"the scores of {names[0]}", f"those of {name}")
        Plan(recipe)  # refuses what cannot run before the first one trains
    folder, runs, protocols = made(Path(out).expanduser(), "--out"), [], []
    for path, name in zip(recipes, names, strict=True):
        for seed in seeds:
            run = folder / f"{name}-seed{seed}"
            say(f"--- {name}, seed {seed} ---")
            code = train(path, [*overrides, f"seed={seed}", f"output={run}"])
            if code != DONE:
                return code
            found = json.loads((run / "evaluation.json").read_text())
            runs.append({"name": name, "recipe": str(path), "seed": seed, "run": str(run.relative_to(folder)), "scores": found["scores"]})
            protocols.append(comparable(found["protocol"]))
            check_comparable(protocols[0], protocols[-1], f"the scores of {runs[0]['run']}", f"those of {runs[-1]['run']}")
    results = {"runs": runs, "summary": summary(runs), "differences": differing(names, loaded), "protocol": protocols[0]}
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    say(f"written: {folder / 'results.json'} and {write_comparison(results, folder)}")
    return DONE


def scored_by(recipe: Recipe) -> dict[str, Any]:
    """The recipe's evaluation block, but for what happens within the training."""
    block = dump(recipe.evaluation)
    return {key: value for key, value in block.items() if key not in ("in_loop", "seed")}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation (over seeds, ddof 1) of each score of each recipe."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        of_recipe = [run["scores"] for run in runs if run["name"] == name]
        found[name] = {}
        for score in of_recipe[0]:
            values = [scores[score]["value"] for scores in of_recipe]
            spread = statistics.stdev(values) if len(values) > 1 else None
            floor = of_recipe[0][score].get("floor")
            found[name][score] = {"mean": statistics.fmean(values), "std": spread, "values": values, "floor": floor}
    return found


def differing(names: Sequence[str], recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
    """The dotted keys in which the recipes differ, but for seed and output, with each recipe's value."""
    flat = [flattened(recipe.dump()) for recipe in recipes]
    keys = [key for key in dict.fromkeys(key for recipe in flat for key in recipe) if key not in ("seed", "output")]
    different = [key for key in keys if any(recipe.get(key) != flat[0].get(key) for recipe in flat)]
    return {name: {key: recipe.get(key) for key in different} for name, recipe in zip(names, flat, strict=True)}


def flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    return {key: value for name, inner in data.items() for key, value in flattened(inner, f"{prefix}.{name}" if prefix else name).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.compare`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.compare", description="Train and compare recipes over seeds.")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    given = parser.parse_args(arguments)
    return leave(guarded(lambda: compare(given.recipes, seeds_of(given.seeds), given.out, given.overrides)))


def seeds_of(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2.") from None


if __name__ == "__main__":
    sys.exit(main())
