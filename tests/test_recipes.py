"""Every file in recipes/: it is valid, and with a tiny model of the same type, few small images and two steps it runs to its end.

Only sizes are changed; schedule, parameterization, objective, conditioning, optimizer, average, sampler and metrics stay.
"""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import yaml
from commands import TINY_DIT, command, noise_frames, pictures, vae, video
from runs import UNET, UNET3D
from tiny_pipelines import tiny_pipeline

from difftrain.denoisers import CLASSES, num_class_embeddings_in, planned_config
from difftrain.evaluation import features
from difftrain.pipelines.text_to_image import TEXT_TO_IMAGE
from difftrain.recipe import Recipe, load, read_yaml
from difftrain.registry import ADAPTERS, DENOISERS, Part
from difftrain.sampling import DDIM, diffusers_scheduler
from difftrain.schedule import NoiseSchedule

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
CONDITION = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
             "cross_attention_dim": 8, "attention_head_dim": 4}  # fmt: skip


def small_model(model: Part, latent: bool, folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A model of the recipe's type, with its channels and label table, some thousand parameters large; one from a path lies in `folder`."""
    pretrained, digits = model.arguments["path"] is not None, data["type"] == "digits"
    own_config = {"in_channels": 4 if latent else 1 if digits else 3, "out_channels": None, "num_class_embeds": 11 if digits else None}
    config = own_config if pretrained else planned_config(model)
    channels = {"in_channels": config["in_channels"], "out_channels": config["out_channels"] or config["in_channels"]}
    if model.name == "unet3d_condition":
        own = dict(UNET3D)
    elif model.name == "dit":
        own = {**TINY_DIT, "num_embeds_ada_norm": config["num_embeds_ada_norm"]}
    else:
        own = {**UNET, **(CONDITION if model.name == "unet2d_condition" else {}), "num_class_embeds": num_class_embeddings_in(config)}
    made = {"type": model.name, "config": {**own, **channels}}
    size = {} if digits else {"config": {"sample_size": 6}}
    return {"type": model.name, "path": str(saved_pipeline(made, folder)), **size} if pretrained else made


def saved_pipeline(model: dict[str, Any], folder: Path) -> Path:
    """A pipeline folder as diffusers saves it: the model with drawn weights, and what its schedule is."""
    DENOISERS.parse(model, "model").build().save_model(folder / CLASSES[model["type"]][1])
    diffusers_scheduler(DDIM(), NoiseSchedule.scaled_linear(), "epsilon", clip=False).save_pretrained(folder / "scheduler")
    return folder


def small_data(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same kind of data set, of 12 small images or a short video, where the recipe's own does not come with the library."""
    if data["type"] == "video_folder":
        pytest.importorskip("av", reason="an extra: pip install .[video]")
        video(folder / "videos" / "a.mp4", noise_frames(data["num_frames"] * data.get("frame_step", 1), (12, 12)))
        return {**data, "path": str(folder / "videos")}
    if data["type"] == "digit_clips":
        return {**data, "num_frames": 3, "size": UNET3D["sample_size"]}
    if data["type"] == "image_folder":
        return {**data, "path": str(pictures(folder / "pictures", size=(12, 10), classes=3 if data.get("labels") == "folders" else 0))}
    if data["type"] == "huggingface":
        return {**data, "path": "parquet", "data_files": str(parquet(folder / "images.parquet", data))}
    assert data["type"] == "digits", "say here how a small one is made"
    return data


def parquet(file: Path, data: dict[str, Any]) -> Path:
    rows = []
    for i in range(12):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (12, 10), (20 * i, 10, 200)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 10, "caption": f"picture {i}"})
    names = {"image": data.get("image_column", "image"), "label": data.get("label_column") or "label"}
    datasets.Dataset.from_list([{names.get(key, key): value for key, value in row.items()} for row in rows]).to_parquet(file)
    return file


def small_scores(evaluation: dict[str, Any], folder: Path) -> dict[str, Any]:
    loop = evaluation.get("in_loop")
    small = {**evaluation, "num_samples": 8, "reference": small_data(evaluation["reference"], folder)}
    if loop:
        small["in_loop"] = {**loop, "every": 1, "num_samples": 8, "reference": small_data(loop["reference"], folder)}
    return small


def small(recipe: Recipe, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe's plain data with everything made small."""
    latent = recipe.encoder is not None
    model = small_model(recipe.model, latent, folder / "pretrained", data["data"])
    batch = min(8, recipe.training.arguments["batch_size"])
    micro = max(1, batch // 2)
    two_steps = {"steps": 2, "batch_size": batch, "micro_batch_size": micro, "num_sampled": 2, "sample_every": 1, "log_every": 1}
    changed = {
        **data, "output": str(folder / "run"), "model": model, "data": small_data(data["data"], folder),
        "transform": {**data["transform"], "resolution": model.get("config", UNET)["sample_size"] * (2 if latent else 1)},
        "training": {**data["training"], **two_steps},
        "loader": {**data.get("loader", {}), "num_workers": 0},
        "sampling": {**data["sampling"], "block_size": 4, "sampler": {**data["sampling"]["sampler"], "steps": 3}},
    }
    if latent:
        changed["encoder"] = {**data["encoder"], "path": str(vae(folder / "vae"))}
    if data.get("evaluation"):
        changed["evaluation"] = small_scores(data["evaluation"], folder)
    if data.get("prior"):
        changed["prior"] = {**data["prior"], "num": 4}
    if data.get("adapter"):
        changed["adapter"] = {**data["adapter"], "rank": 2}
    return changed


def captioned(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same kind of data set, of 12 small images with captions."""
    if data["type"] == "huggingface":
        return small_data(data, folder)
    photos = pictures(folder / "pictures", size=(20, 24))
    for file in photos.glob("*.png"):
        file.with_suffix(".txt").write_text(f"a photo of {file.stem}")
    return {**data, "path": str(photos)}


def small_fine_tune(recipe: Recipe, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plain data of a recipe that fine-tunes a text-to-image pipeline, with a tiny one and a few captioned images."""
    base = tiny_pipeline(recipe.model.name, folder / "pretrained", max_length=16)
    makes_lora = ADAPTERS.constructors[data["adapter"]["type"]].makes_lora
    two_steps = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "num_sampled": 2, "sample_every": 1, "log_every": 1}
    changed = {
        **data, "output": str(folder / "run"), "model": {**data["model"], "path": str(base)},
        "data": captioned(data["data"], folder), "adapter": {**data["adapter"], **({"rank": 2} if makes_lora else {})},
        "transform": {**data["transform"], "resolution": 16},
        "training": {**data["training"], **two_steps}, "loader": {**data.get("loader", {}), "num_workers": 0},
        "sampling": {**data["sampling"], "block_size": 4, "sampler": {**data["sampling"]["sampler"], "steps": 3}},
    }
    small_blocks: dict[str, dict[str, Any]] = {"cache": {"folder": str(folder / "cache")}, "buckets": {"step": 4}, "prior": {"num": 2}}
    if data.get("validation"):
        held_out = captioned(data["validation"]["data"], folder)
        small_blocks["validation"] = {"data": held_out, "every": 1, "num": 2, "num_timesteps": 2}
    return changed | {key: {**data[key], **own} for key, own in small_blocks.items() if data.get(key)}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs_two_steps_with_a_tiny_model(file, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 3)  # of the digits' classifier
    changed = tmp_path / "recipe.yaml"
    made_small = small_fine_tune if load(file).model.name in TEXT_TO_IMAGE else small
    changed.write_text(yaml.safe_dump(made_small(load(file), read_yaml(file.read_text(), str(file)), tmp_path), sort_keys=False))

    command("train", changed)

    run, recipe = tmp_path / "run", load(changed)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2]
    makes_lora = recipe.adapter is not None and ADAPTERS.constructors[recipe.adapter.name].makes_lora
    result = "lora" if makes_lora else "pipeline"
    assert {"report.html", "recipe.yaml", "status.json", result, "samples", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "status.json").read_text())["code"] == 0
    if recipe.evaluation is not None:
        scores = json.loads((run / "evaluation.json").read_text())["scores"]
        assert {part.name for part in recipe.evaluation.arguments["metrics"]} <= set(scores) | {"precision_recall"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_in_a_comment_what_it_is(file):
    assert file.read_text().startswith("# ")


def test_recipes_write_to_folders_of_their_own():
    assert len({load(file).output for file in RECIPES}) == len(RECIPES)


def test_there_are_recipes_for_what_the_readme_promises():
    assert {"digits", "digits_baseline", "digits_p2", "digits_debiased", "digits_input_perturbation"} <= {file.stem for file in RECIPES}
