"""Every file in recipes/ is valid, and runs to its end with a tiny model, few images and two steps.

Sizes alone are changed. Schedule, parameterization, objective, conditioning, optimizer, average,
sampler and metrics stay.
"""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import yaml
from helpers.commands import command, noise_frames, pictures, video
from helpers.places import ROOT
from helpers.tiny_networks import CONDITION, TINY_DIT, UNET, UNET3D, vae
from helpers.tiny_pipelines import tiny_pipeline

from difftrain.core.registry import Part
from difftrain.evaluation.features import classifier
from difftrain.generation.samplers import DDIM
from difftrain.models.denoisers import DiffusersNetwork
from difftrain.models.pipelines.text_to_image import TextToImageModel
from difftrain.models.slots import ADAPTERS, MODELS
from difftrain.objective.schedule import NoiseSchedule
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.recipe.yaml_text import read_yaml
from difftrain.run import diagnosis

RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "own").glob("*.yaml")])
NAMES = [str(file.relative_to(ROOT / "recipes").with_suffix("")) for file in RECIPES]
Block = dict[str, Any]


def is_a(model: Part, kind: type) -> bool:
    """Return whether the model's registered constructor is a class of this kind."""
    constructor = MODELS.constructors[model.name]
    return isinstance(constructor, type) and issubclass(constructor, kind)


# Models


def small_model(recipe: Recipe, folder: Path, data: Block) -> Block:
    """Return a model of the recipe's type with its channels and label table, but tiny.

    Args:
        recipe: The recipe.
        folder: Where the network of a recipe that names a path is written.
        data: The recipe's data block.
    """
    model, is_latent = recipe.model, recipe.encoder is not None
    has_digits = data["type"] == "digits"
    if model.arguments["path"] is None:
        config = model.build().config
        return {"type": model.name, "config": small_config(model.name, config)}
    pretrained = {
        "in_channels": 1 if has_digits else 3,
        "out_channels": None,
        "num_class_embeds": 11 if has_digits else None,
    }
    if is_latent:
        pretrained["in_channels"] = 4
    saved = {"type": model.name, "config": small_config(model.name, pretrained)}
    small = {"type": model.name, "path": str(saved_pipeline(saved, folder))}
    return small if has_digits else {**small, "config": {"sample_size": 6}}


def small_config(name: str, config: Block) -> Block:
    """Return a tiny config of a model with the channels and the label table of another one."""
    if name == "unet3d_condition":
        own = UNET3D
    elif name == "dit":
        own = {**TINY_DIT, "num_embeds_ada_norm": config["num_embeds_ada_norm"]}
    else:
        network = CONDITION if name == "unet2d_condition" else UNET
        own = {**network, "num_class_embeds": config["num_class_embeds"]}
    channels = config["in_channels"]
    return {**own, "in_channels": channels, "out_channels": config["out_channels"] or channels}


def saved_pipeline(block: Block, folder: Path) -> Path:
    """Write a pipeline folder of a randomly initialized model, with the schedule that it states."""
    model = MODELS.parse(block, "model").build()
    model.denoiser().save_model(folder / model.folder)
    scheduler = DDIM().build(NoiseSchedule.scaled_linear(), "epsilon", clip=False)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


# Data


def small_data(data: Block, folder: Path) -> Block:
    """Return a data set of the same kind, but small: 12 images, or a short video."""
    if data["type"] == "video_folder":
        pytest.importorskip("av", reason="an extra: pip install .[video]")
        num = data["num_frames"] * data.get("frame_step", 1)
        video(folder / "videos" / "a.mp4", noise_frames(num, (12, 12)))
        return {**data, "path": str(folder / "videos")}
    if data["type"] == "digit_clips":
        return {**data, "num_frames": 3, "size": UNET3D["sample_size"]}
    if data["type"] == "image_folder":
        classes = 3 if data.get("labels") == "folders" else 0
        images = pictures(folder / "pictures", size=(12, 10), classes=classes)
        return {**data, "path": str(images)}
    if data["type"] == "huggingface":
        file = parquet(folder / "images.parquet", data)
        return {**data, "path": "parquet", "data_files": str(file)}
    if data["type"] == "two_moons":
        return {**data, "num": 40}
    assert data["type"] == "digits", "say here how a small one is made"
    return data


def parquet(file: Path, data: Block) -> Path:
    """Write 12 images with the columns that a data block names."""
    image = data.get("image_column", "image")
    label = data.get("label_column") or "label"
    rows = []
    for i in range(12):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (12, 10), (20 * i, 10, 200)).save(buffer, "PNG")
        encoded = {"bytes": buffer.getvalue(), "path": None}
        rows.append({image: encoded, label: i % 10, "caption": f"picture {i}"})
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def captioned(data: Block, folder: Path) -> Block:
    """Return a data set of the same kind, of 12 small images with captions."""
    if data["type"] == "huggingface":
        return small_data(data, folder)
    photos = pictures(folder / "pictures", size=(20, 24))
    for file in photos.glob("*.png"):
        file.with_suffix(".txt").write_text(f"a photo of {file.stem}")
    return {**data, "path": str(photos)}


# Recipes


def two_steps(data: Block, batch_size: int) -> Block:
    """Return a recipe's blocks of training, loading and sampling, cut down to two steps."""
    training = {
        "steps": 2,
        "batch_size": batch_size,
        "micro_batch_size": max(1, batch_size // 2),
        "num_sampled": 2,
        "sample_every": 1,
        "log_every": 1,
    }
    sampler = {**data["sampling"]["sampler"], "steps": 3}
    return {
        "training": {**data["training"], **training},
        "loader": {**data.get("loader", {}), "num_workers": 0},
        "sampling": {**data["sampling"], "block_size": 4, "sampler": sampler},
    }


def small_scores(evaluation: Block, folder: Path) -> Block:
    """Return an evaluation block of few samples."""
    reference = small_data(evaluation["reference"], folder)
    small = {**evaluation, "num_samples": 8, "reference": reference}
    loop = evaluation.get("in_loop")
    if loop:
        reference = small_data(loop["reference"], folder)
        small["in_loop"] = {**loop, "every": 1, "num_samples": 8, "reference": reference}
    return small


def small(recipe: Recipe, data: Block, folder: Path) -> Block:
    """Return a recipe's plain data with everything small."""
    batch_size = min(8, recipe.training.arguments["batch_size"])
    changed = {**data, **two_steps(data, batch_size), "output": str(folder / "run")}
    changed["data"] = small_data(data["data"], folder)
    if is_a(recipe.model, DiffusersNetwork):
        changed["model"] = small_model(recipe, folder / "pretrained", data["data"])
        side = changed["model"].get("config", UNET)["sample_size"]
        resolution = side if recipe.encoder is None else 2 * side
        changed["transform"] = {**data["transform"], "resolution": resolution}
    if recipe.encoder is not None:
        changed["encoder"] = {**data["encoder"], "path": str(vae(folder / "vae"))}
    if data.get("evaluation"):
        changed["evaluation"] = small_scores(data["evaluation"], folder)
    if data.get("prior"):
        changed["prior"] = {**data["prior"], "num": 4}
    if data.get("adapter"):
        changed["adapter"] = {**data["adapter"], "rank": 2}
    return changed


def small_fine_tune(recipe: Recipe, data: Block, folder: Path) -> Block:
    """Return the plain data of a recipe that fine-tunes a text-to-image pipeline, a tiny one."""
    base = tiny_pipeline(recipe.model.name, folder / "pretrained", max_length=16)
    changed = {**data, **two_steps(data, 4), "output": str(folder / "run")}
    changed["model"] = {**data["model"], "path": str(base)}
    changed["data"] = captioned(data["data"], folder)
    changed["transform"] = {**data["transform"], "resolution": 16}
    if makes_lora(recipe):
        changed["adapter"] = {**data["adapter"], "rank": 2}
    own: Block = {
        "cache": {"folder": str(folder / "cache")},
        "buckets": {"step": 4},
        "prior": {"num": 2},
    }
    if data.get("validation"):
        held_out = captioned(data["validation"]["data"], folder)
        own["validation"] = {"data": held_out, "every": 1, "num": 2, "num_timesteps": 2}
    for key, block in own.items():
        if data.get(key):
            changed[key] = {**data[key], **block}
    return changed


def makes_lora(recipe: Recipe) -> bool:
    """Return whether a run of the recipe ends with a LoRA file."""
    if recipe.adapter is None:
        return False
    return ADAPTERS.constructors[recipe.adapter.name].makes_lora


@pytest.mark.parametrize("file", RECIPES, ids=NAMES)
def test_a_recipe_runs_two_steps_with_a_tiny_model(file, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 3)  # of the digits' classifier
    monkeypatch.setattr(diagnosis, "QUICK", {"num": 24, "num_timesteps": 4})
    # The recipe, made small
    original, data = load(file), read_yaml(file.read_text(), str(file))
    is_text_to_image = is_a(original.model, TextToImageModel)
    make_small = small_fine_tune if is_text_to_image else small
    changed = tmp_path / "recipe.yaml"
    changed.write_text(yaml.safe_dump(make_small(original, data, tmp_path), sort_keys=False))

    command("train", changed)

    # What the run leaves
    run, recipe = tmp_path / "run", load(changed)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2]
    result = "lora" if makes_lora(recipe) else "pipeline"
    entries = {path.name for path in run.iterdir()}
    expected = {"report.html", "recipe.yaml", "status.json", "samples", "checkpoints"}
    assert {*expected, result} <= entries
    assert json.loads((run / "status.json").read_text())["code"] == 0
    if recipe.evaluation is not None:
        scores = json.loads((run / "evaluation.json").read_text())["scores"]
        metrics = {part.name for part in recipe.evaluation.arguments["metrics"]}
        assert metrics - {"precision_recall"} <= set(scores)


@pytest.mark.parametrize("file", RECIPES, ids=NAMES)
def test_a_recipe_says_in_a_comment_what_it_is(file):
    assert file.read_text().startswith("# ")


def test_recipes_write_to_folders_of_their_own():
    assert len({load(file).output for file in RECIPES}) == len(RECIPES)


def test_there_are_recipes_for_what_the_readme_promises():
    promised = {"digits", "digits_baseline", "digits_p2", "digits_debiased"}
    promised |= {"digits_input_perturbation", "own/digits", "own/points"}
    assert promised <= set(NAMES)
