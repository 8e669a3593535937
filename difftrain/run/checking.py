"""Preflight: what a recipe will train, on what, and what it needs. Trains nothing."""

import shutil
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.core.processes import num_processes
from difftrain.data.items import Dataset, MapDataset
from difftrain.data.left_out import LeftOut, account
from difftrain.data.unreadable import TRAINING, looked_through
from difftrain.evaluation.slots import FEATURES
from difftrain.models.files import looks_local
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.run.model import ModelPlan
from difftrain.run.scoring import FINAL, IN_LOOP
from difftrain.run.session import Plans
from difftrain.run.training import Launch
from difftrain.training.lr import remarks

GIB = 2**30
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SECONDS = 60.0  # for which the items of a data set are decoded
FOLDERS = ("image_folder", "video_folder")  # data sets whose `path` is never a hub id
MOST_PROMPTS = 3


def check(path: str, overrides: list[str], everything: bool = False) -> str:
    """Check a recipe.

    Args:
        path: The recipe file.
        overrides: Dotted changes.
        everything: Whether all items of the data sets are decoded, and not only for a minute each.

    Returns:
        The findings, a line each.

    Raises:
        InputError: If the recipe cannot run.
    """
    plans = Plans(load(path, overrides), Launch(num_processes()))
    recipe, model, settings = plans.recipe, plans.model, plans.training.settings
    memory, checkpoint = sizes(plans)
    # The disk
    num_checkpoints = settings.keep_checkpoints + 2  # the best one, and the one being written
    free = shutil.disk_usage(existing_parent(Path(recipe.output))).free
    if num_checkpoints * checkpoint > free:
        raise InputError(
            f"output: {num_checkpoints} checkpoints of {checkpoint / GIB:.2f} GiB do not fit into "
            f"the {free / GIB:.2f} GiB free at {recipe.output}. Write another output:, or "
            "training: {keep_checkpoints: 1}."
        )
    # The lines; empty ones are left out
    items = model.facts.items
    weights = plans.training.objective.weights
    shown_weights = f"{weights.min():.3g} to {weights.max():.3g}"
    lines = {
        "recipe": f"{path}: every key is known, every value within its bounds",
        "data": data_line(plans),
        **read_lines(plans, None if everything else SECONDS),
        "buckets": buckets(plans),
        "text": "\n".join(plans.data.cut_off()),
        "cache": cached(plans),
        "model": f"{model.model.name}, {model.num_parameters:,} parameters, {model.model.dtype}",
        "prompts": prompts(model),
        "scored": scored(plans),
        "adapter": "" if model.adapter is None else model.trains,
        "objective": f"{model.parameterization} on {model.schedule!r}; weights {shown_weights}",
        "lr": "\n".join(remarks(recipe.lr_schedule.build(), settings.steps)),
        "training": f"{settings.steps} steps of {settings.batch_size} {items}",
        "code": code_line(recipe),
        "hub": ", ".join(hub_ids(recipe.dump())) or "nothing",
        "memory": f"{memory_line(memory, model)}",
        "disk": (
            f"{num_checkpoints} checkpoints of about {in_words(checkpoint)}; "
            f"{free / GIB:.1f} GiB free"
        ),
    }
    shown = [f"{name:<11}{text}" for name, text in lines.items() if text]
    return "\n".join(line.replace("\n", "\n" + " " * 11) for line in shown)


def read_lines(plans: Plans, seconds: float | None) -> dict[str, str]:
    """Look through the data sets that a run reads.

    Args:
        plans: What the run builds.
        seconds: For how long the items of each are decoded; None: all of them.

    Returns:
        What is read and what is left out of each, by the name of its line.

    Raises:
        InputError: If an item cannot be read, and the recipe does not leave it out.
    """
    sets: dict[str, tuple[str, Dataset | None]] = {
        "read": (TRAINING, plans.data.data),
        "validation": ("validation.data", plans.data.held_out),
    }
    if plans.scoring is not None:
        settings = plans.scoring.settings
        sets["reference"] = (FINAL, plans.scoring.opened(FINAL, settings.reference))
        if settings.in_loop is not None:
            found = plans.scoring.opened(IN_LOOP, settings.in_loop.reference)
            sets["in_loop"] = (IN_LOOP, found)
        constructor: Any = FEATURES.constructors[settings.features.name]
        learned_from = constructor.learned_from(settings.features.arguments)
        sets["classifier"] = ("evaluation.features.data", learned_from)
    return {
        name: read_line(plans, key, data, seconds)
        for name, (key, data) in sets.items()
        if isinstance(data, MapDataset)
    }


def read_line(plans: Plans, key: str, data: MapDataset, seconds: float | None) -> str:
    """Look through a data set; see `read_lines`. "" where nothing needs to be said."""
    problems, num_tried = looked_through(data, seconds)
    if problems and plans.errors.on_error == "stop":
        raise InputError(f"{key}: {plans.errors.stopped(problems, num_tried)}")
    never_items = [LeftOut(one.name, f"cannot be read: {one.reason}") for one in data.not_opened()]
    unreadable = [LeftOut(one.name, f"cannot be read: {one.reason}") for one in problems]
    left_out = [*data.left_out(), *never_items, *unreadable]
    said = account(len(data) - len(problems), left_out) if left_out else ""
    if num_tried < len(data):
        part = f"{num_tried:,} of {len(data):,} were decoded; --all decodes every one"
        said = f"{said}\n{part}" if said else part
    return said


def sizes(plans: Plans) -> tuple[int, int]:
    """Return the bytes that training holds in memory, and those of a checkpoint."""
    model, recipe = plans.model, plans.recipe
    trained = model.num_trained
    size = SIZES[model.model.dtype]
    frozen = model.num_parameters - (0 if model.makes_lora else trained)
    size_of_trained = size if model.adapter is None else max(size, 4)  # float32 at least
    average = 0 if recipe.ema is None else 4 * trained
    # Weights and, for optimizers of Adam's kind, two moments
    checkpoint = size_of_trained * trained * 3 + average
    memory = size * frozen + 4 * size_of_trained * trained + average
    return memory, checkpoint


def data_line(plans: Plans) -> str:
    """Describe the data: how many items, of which shape, and what they are conditioned on."""
    model, data = plans.model, plans.data.data
    count = "a stream"
    if isinstance(data, MapDataset):
        count = f"{len(data)} {model.facts.items}"
    conditions = f"{model.conditioning.num_classes or 'no'} classes"
    if model.model.takes_prompts:
        conditions = "captions"
    guided = ", can be guided" if model.conditioning.can_guide else ""
    return f"{count} of {model.item_in_words}, {conditions}{guided}"


def buckets(plans: Plans) -> str:
    """Return the table of buckets; sizes are read from the images' headers."""
    plan = plans.data.bucket_plan(plans.data.data)
    if plan is None:
        return ""
    table = plan.table()
    if plans.data.prior is None or plans.model.transform is None:
        return table
    side = plans.model.transform.resolution
    return f"{table}\none prior sample for each image is added at {side} x {side}"


def cached(plans: Plans) -> str:
    """Describe where the cache is, and what is read from it."""
    cache = plans.data.cache
    if cache is None:
        return ""
    has_latents = cache.latents and plans.model.encoder is not None
    has_text = plans.data.caches_text and plans.model.model.takes_prompts
    kinds = {"latents": has_latents, "text": has_text}
    said = [f"{what} {'cached' if is_kept else 'not cached'}" for what, is_kept in kinds.items()]
    return f"{cache.folder}: {', '.join(said)}"


def memory_line(memory: float, model: ModelPlan) -> str:
    """Describe the memory that is needed, apart from activations."""
    beside = ""
    if model.encoder is not None:
        beside = ", VAE and text encoders" if model.model.takes_prompts else ", VAE"
    parts = "weights, gradients, optimizer and average"
    return f"{in_words(memory)} of {parts}; activations{beside} on top"


def in_words(size: float) -> str:
    """Return a number of bytes for reading."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def prompts(model: ModelPlan) -> str:
    """Return the first prompts of generated samples, and how many more there are."""
    if not model.model.takes_prompts:
        return ""
    known = model.prompts
    shown = ", ".join(map(repr, known[:MOST_PROMPTS]))
    more = len(known) - MOST_PROMPTS
    return f"{shown} and {more} more" if more > 0 else shown


def scored(plans: Plans) -> str:
    """Return what the samples of the final scores are asked to show."""
    conditions = None if plans.scoring is None else plans.scoring.conditions(FINAL)
    if plans.scoring is None or conditions is None:
        return ""
    return f"{plans.scoring.settings.num_samples:,} samples show {conditions.in_words}"


def code_line(recipe: Recipe) -> str:
    """Name the code that a recipe brings, which can do whatever its author wanted."""
    found = [f"imports: {', '.join(recipe.imports)}"] if recipe.imports else []
    if recipe.evaluation is not None:
        features = recipe.evaluation.build().features
        if features.name in ("torchscript", "imported"):
            found.append(f"features: {features.name} ({features.arguments.get('path')})")
    if not found:
        return ""
    return f"{'; '.join(found)}. This code can read and write files: run only what you trust"


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    path = path.expanduser().resolve()
    while not path.exists():
        path = path.parent
    return path


def hub_ids(data: Any) -> list[str]:
    """Return paths in a dumped recipe that mean something on the hub rather than a folder here."""
    found: list[str] = []
    if isinstance(data, list):
        for value in data:
            found += hub_ids(value)
    if isinstance(data, dict):
        if data.get("type") not in FOLDERS:
            for key in ("path", "config"):
                path = data.get(key)
                if isinstance(path, str) and not looks_local(path):
                    found.append(path)
        for value in data.values():
            found += hub_ids(value)
    return found
