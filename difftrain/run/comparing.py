"""Several recipes over several seeds: trained, scored, and set side by side."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftrain.core.console import wing_logger
from difftrain.core.errors import ExitCode, InputError
from difftrain.core.files import writable_folder, write_json
from difftrain.core.processes import num_processes
from difftrain.core.registry import dump
from difftrain.evaluation.protocols import check_comparable
from difftrain.evaluation.results import comparable, comparable_pair
from difftrain.recipe.changes import flattened
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.report import write_comparison
from difftrain.run.scoring import FINAL
from difftrain.run.session import Plans, train
from difftrain.run.training import Launch

logger = wing_logger(__name__)

# What the summary takes from a recipe's first run
COPIED = ("floor", "floor_basis", "floor_count", "floor_reference_count", "better", "title")


def compare(
    recipes: Sequence[str], seeds: Sequence[int], out: str, overrides: Sequence[str] = ()
) -> int:
    """Train each recipe with each seed, and write what they score.

    Runs resume: the same command goes on where it was stopped.

    Args:
        recipes: Recipe files.
        seeds: Seeds of the runs.
        out: The folder for the runs, results.json and report.html.
        overrides: Changes of every recipe.

    Returns:
        The first exit code that is not 0, or 0.

    Raises:
        InputError: Before the first run, if the scores could not be compared.
    """
    names = [Path(recipe).stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise InputError(
            f"compare: two recipes have one file name ({', '.join(names)}). Rename one."
        )
    if len(set(seeds)) < len(seeds):
        listed = ",".join(map(str, seeds))
        raise InputError(f"--seeds {listed}: a seed is written twice. Keep one.")
    loaded = [load(recipe, overrides) for recipe in recipes]
    check_recipes(names, loaded)
    folder = writable_folder(Path(out).expanduser(), "--out")
    runs: list[dict[str, Any]] = []
    protocols: list[dict[str, Any]] = []
    for path, name in zip(recipes, names, strict=True):
        for seed in seeds:
            run = folder / f"{name}-seed{seed}"
            logger.info(f"--- {name}, seed {seed} ---")
            code = train(path, [*overrides, f"seed={seed}", f"output={run}"])
            if code != ExitCode.DONE:
                return code
            found = json.loads((run / "evaluation.json").read_text())
            runs.append(
                {
                    "name": name,
                    "recipe": str(path),
                    "seed": seed,
                    "run": str(run.relative_to(folder)),
                    "scores": found["scores"],
                }
            )
            protocols.append(found["protocol"])
            check_against_all(runs, protocols)
    results = {
        "runs": runs,
        "summary": summary(runs),
        "differences": differing(names, loaded),
        "protocol": comparable(protocols[0]),
    }
    write_json(folder / "results.json", results)
    report = write_comparison(results, folder)
    logger.info(f"written: {folder / 'results.json'} and {report}")
    return ExitCode.DONE


def check_against_all(
    runs: Sequence[Mapping[str, Any]], protocols: Sequence[dict[str, Any]]
) -> None:
    """Refuse scores of the last run that cannot be compared with those of an earlier one.

    Args:
        runs: The runs so far, each with its "run".
        protocols: Their protocols.
    """
    last = f"those of {runs[-1]['run']}"
    for run, protocol in zip(runs[:-1], protocols[:-1], strict=True):
        one, other = comparable_pair(protocol, protocols[-1])
        check_comparable(one, other, f"the scores of {run['run']}", last)


def check_recipes(names: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Refuse recipes whose scores could not be compared, and recipes that cannot run."""
    chosen: list[dict[str, Any]] = []
    for number, (name, recipe) in enumerate(zip(names, recipes, strict=True)):
        if recipe.evaluation is None:
            raise InputError(
                f"compare: the recipe {name} has no evaluation: block, so there is nothing to "
                "compare. Add one."
            )
        first, last = f"the scores of {names[0]}", f"those of {name}"
        check_comparable(scored_by(recipes[0]), scored_by(recipe), first, last)
        chosen.append(labels_of(Plans(recipe, Launch(num_processes()))))
        for earlier in range(number):
            one, other = comparable_pair(chosen[earlier], chosen[number])
            check_comparable(one, other, f"the scores of {names[earlier]}", last)


def scored_by(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's evaluation block without what happens within the training.

    Where features are kept does not count either. Its labels are compared as they are chosen, by
    `labels_of`.
    """
    block = dump(recipe.evaluation)
    left_out = ("in_loop", "seed", "labels", "store")
    return {key: value for key, value in block.items() if key not in left_out}


def labels_of(plans: Plans) -> dict[str, Any]:
    """Return what the samples of a run are asked to show, as its protocol will say it."""
    assert plans.scoring is not None
    conditions = plans.scoring.conditions(FINAL)
    return {} if conditions is None else {"labels": conditions.compared()}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation (over seeds, ddof 1) of each score of each recipe."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        of_recipe = [run["scores"] for run in runs if run["name"] == name]
        found[name] = {}
        for score, first in of_recipe[0].items():
            values = [scores[score]["value"] for scores in of_recipe]
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[name][score] = {
                "mean": statistics.fmean(values),
                "std": spread,
                "values": values,
                **{key: first.get(key) for key in COPIED},
            }
    return found


def differing(names: Sequence[str], recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
    """Return the values of the dotted keys in which recipes differ, apart from seed and output."""
    flat = [flattened(recipe.dump()) for recipe in recipes]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    different = []
    for key in keys:
        values = [recipe.get(key) for recipe in flat]
        if key not in ("seed", "output") and any(value != values[0] for value in values):
            different.append(key)
    return {
        name: {key: recipe.get(key) for key in different}
        for name, recipe in zip(names, flat, strict=True)
    }
