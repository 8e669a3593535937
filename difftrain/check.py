"""Preflight: what `difftrain check RECIPE` says before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

from difftrain.data.facts import left_out
from difftrain.data.items import ImageStream
from difftrain.feeding import cut_off
from difftrain.pipelines.files import looks_local
from difftrain.pipelines.text_conditioning import TextConditioning
from difftrain.plan import Plan
from difftrain.recipe import load
from difftrain.registry import InputError

GIB = 2**30
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2}


def check(path: str, overrides: list[str]) -> str:
    """The findings, a line each. Raises InputError where the recipe cannot run."""
    plan = Plan(load(path, overrides))
    recipe, trained = plan.recipe, plan.num_trained
    size = SIZES[recipe.model.arguments["dtype"]]
    makes_lora = plan.adapter is not None and plan.adapter.makes_lora
    frozen = plan.num_parameters - (0 if makes_lora else trained)
    of_trained = size if plan.adapter is None else max(size, 4)  # an adapter trains in float32 at least
    average = 4 * trained if recipe.ema else 0
    checkpoint = of_trained * trained * 3 + average  # weights and, for Adam's kind, two moments
    kept = plan.training.keep_checkpoints + 2  # the best, and the one being written
    free = shutil.disk_usage(existing_parent(Path(recipe.output))).free
    if kept * checkpoint > free:
        raise InputError(f"output: {kept} checkpoints of {checkpoint / GIB:.2f} GiB do not fit into the {free / GIB:.2f} GiB free at "
                         f"{recipe.output}. Write another output:, or training: {{keep_checkpoints: 1}}.")
    conditioning, weights = plan.conditioning, plan.objective.weights
    told = "captions" if plan.pipeline is not None else f"{conditioning.num_classes or 'no'} classes"
    classes = f"{told}{', can be guided' if conditioning.can_guide else ''}"
    items = "images" if plan.num_frames is None else "clips"
    count = "a stream" if isinstance(plan.data, ImageStream) else f"{len(plan.data)} {items}"
    lines = {
        "recipe": f"{path}: every key is known, every value within its bounds",
        "data": f"{count} of {plan.images_in_words}, {classes}",
        "unlisted": "\n".join(left_out(plan.data)),
        "buckets": buckets(plan),
        "text": "\n".join(cut_off(plan)),
        "cache": cached(plan),
        "model": f"{recipe.model.name}, {plan.num_parameters:,} parameters, {recipe.model.arguments['dtype']}",
        "prompts": prompts(conditioning) if isinstance(conditioning, TextConditioning) else "",
        "adapter": plan.trains if plan.adapter is not None else "",
        "objective": f"{plan.parameterization} on {plan.schedule!r}; weights {weights.min():.3g} to {weights.max():.3g}",
        "training": f"{plan.training.steps} steps of {plan.training.batch_size} {items}",
        "fetched": ", ".join(hub_ids(recipe.dump())) or "nothing",
        "memory": memory(size * frozen + 4 * of_trained * trained + average, plan),
        "disk": f"{kept} checkpoints of about {in_words(checkpoint)}; {free / GIB:.1f} GiB free",
    }
    return "\n".join(f"{name:<11}{text}".replace("\n", "\n" + " " * 11) for name, text in lines.items() if text)


def buckets(plan: Plan) -> str:
    """The table of buckets; sizes are read from the images' headers."""
    if plan.recipe.buckets is None:
        return ""
    table = plan.recipe.buckets.build().plan(plan.data, plan.transform, plan.recipe.seed, plan.training.batch_size).table()
    side = plan.transform.resolution
    return table if plan.prior is None else f"{table}\nsamples of the prior, as many as images, go beside them at {side} x {side}"


def cached(plan: Plan) -> str:
    """Where the cache is, and what is read from it."""
    if plan.cache is None:
        return ""
    kept = {"latents": plan.cache.latents and plan.encoder is not None, "text": plan.caches_text and plan.pipeline is not None}
    said = {True: "cached", False: "not cached"}
    return f"{plan.cache.folder}: {', '.join(f'{what} {said[is_kept]}' for what, is_kept in kept.items())}"


def memory(bytes_: float, plan: Plan) -> str:
    beside = "" if plan.encoder is None else ", VAE" if plan.pipeline is None else ", VAE and text encoders"
    return f"{in_words(bytes_)} of weights, gradients, optimizer and average; activations{beside} on top"


def in_words(bytes_: float) -> str:
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 10 else f"{bytes_ / 2**20:.2f} MiB"


def prompts(conditioning: TextConditioning, most: int = 3) -> str:
    """The first prompts of generated samples, and how many more there are."""
    shown = ", ".join(map(repr, conditioning.prompts[:most]))
    more = conditioning.num_prompts - most
    return shown + (f" and {more} more" if more > 0 else "")


def existing_parent(path: Path) -> Path:
    path = path.expanduser().resolve()
    while not path.exists():
        path = path.parent
    return path


def hub_ids(data: Any) -> list[str]:
    """Paths in the recipe that mean something on the hub rather than a folder here."""
    if isinstance(data, dict):
        own = [data.get(key) for key in ("path", "config")] if data.get("type") not in ("image_folder", "video_folder") else []
        here = [path for path in own if isinstance(path, str) and not looks_local(path)]
        return here + [path for value in data.values() for path in hub_ids(value)]
    return [path for value in data for path in hub_ids(value)] if isinstance(data, list) else []
