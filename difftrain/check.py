"""Preflight: what `difftrain check RECIPE` says before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

from difftrain.data.items import ImageStream
from difftrain.pipelines.pretrained import looks_local
from difftrain.plan import Plan
from difftrain.recipe import load
from difftrain.registry import InputError

GIB = 2**30


def check(path: str, overrides: list[str]) -> str:
    """The findings, a line each. Raises InputError where the recipe cannot run."""
    plan = Plan(load(path, overrides))
    recipe, parameters = plan.recipe, plan.num_parameters
    size = {"float32": 4, "float64": 8, "bfloat16": 2}[recipe.model.arguments["dtype"]]
    average = 4 * parameters if recipe.ema else 0
    checkpoint = size * parameters * 3 + average  # weights and, for Adam's kind, two moments
    kept = plan.training.keep_checkpoints + 2  # the best, and the one being written
    free = shutil.disk_usage(existing_parent(Path(recipe.output))).free
    if kept * checkpoint > free:
        raise InputError(f"output: {kept} checkpoints of {checkpoint / GIB:.2f} GiB do not fit into the {free / GIB:.2f} GiB free at "
                         f"{recipe.output}. Write another output:, or training: {{keep_checkpoints: 1}}.")
    conditioning, weights = plan.conditioning, plan.objective.weights
    classes = f"{conditioning.num_classes or 'no'} classes{', can be guided' if conditioning.can_guide else ''}"
    items = "images" if plan.num_frames is None else "clips"
    count = "a stream" if isinstance(plan.data, ImageStream) else f"{len(plan.data)} {items}"
    lines = {
        "recipe": f"{path}: every key is known, every value within its bounds",
        "data": f"{count} of {plan.images_in_words}, {classes}",
        "model": f"{recipe.model.name}, {parameters:,} parameters, {recipe.model.arguments['dtype']}",
        "objective": f"{plan.parameterization} on {plan.schedule!r}; weights {weights.min():.3g} to {weights.max():.3g}",
        "training": f"{plan.training.steps} steps of {plan.training.batch_size} {items}",
        "fetched": ", ".join(hub_ids(recipe.dump())) or "nothing",
        "memory": f"{(4 * size * parameters + average) / GIB:.2f} GiB of weights, gradients, optimizer and average; activations on top",
        "disk": f"{kept} checkpoints of about {checkpoint / GIB:.2f} GiB; {free / GIB:.1f} GiB free",
    }
    return "\n".join(f"{name:<11}{text}" for name, text in lines.items())


def existing_parent(path: Path) -> Path:
    path = path.expanduser().resolve()
    while not path.exists():
        path = path.parent
    return path


def hub_ids(data: Any) -> list[str]:
    """Paths in the recipe that mean something on the hub rather than a folder here."""
    if isinstance(data, dict):
        own = [data["path"]] if isinstance(data.get("path"), str) and data.get("type") not in ("image_folder", "video_folder") else []
        here = [path for path in own if not looks_local(path)]
        return here + [path for value in data.values() for path in hub_ids(value)]
    return [path for value in data for path in hub_ids(value)] if isinstance(data, list) else []
