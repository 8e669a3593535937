"""Whole runs on tiny pipelines of every family, and the files that other programs load."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from helpers.fine_tuning import FAMILIES, PROMPT, photos, pixels, recipe
from helpers.runs import assert_identical, saved
from helpers.single_files import write_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.models.lora.files import save_lora
from difftrain.models.pipelines.flux import packed
from difftrain.run.merging import merge_run
from difftrain.run.sampling import Asked, sample_run
from difftrain.run.session import train

pytestmark = pytest.mark.usefixtures("without_report")


def from_diffusers(pipeline: Any, family: str) -> np.ndarray:
    """Return the pipeline's image of the prompt from the noise of sample 0, as the recipe asks."""
    pipeline.set_progress_bar_config(disable=True)
    if family in ("stable_diffusion", "stable_diffusion_xl"):
        changed = {
            "steps_offset": 0,
            "set_alpha_to_one": True,
            "clip_sample": False,
            "timestep_spacing": "leading",
        }
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, **changed
        )
    channels = pipeline.vae.config.latent_channels
    x = Rng(0, 0, [0]).normal((channels, 8, 8), "initial")
    given = {
        "prompt": PROMPT,
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "guidance_scale": 3.5 if family == "flux" else 3.0,
    }
    return np.asarray(
        pipeline(**given, latents=packed(x) if family == "flux" else x).images[0]
    ).astype(int)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_makes_in_diffusers_what_the_run_samples(pipelines, tmp_path, family, text):
    base = pipelines(family)
    adapter = {
        "type": "lora",
        "rank": 2,
        "alpha": 5.0,
        "targets": "attention_mlp",
        "text_encoders": text,
    }
    assert train(str(recipe(tmp_path, family, base, adapter=adapter, license="CC0-1.0"))) == 0
    run = tmp_path / "run"
    for scale in (None, 0.0):
        sample_run(str(run), 2, str(tmp_path / f"samples-{scale}"), asked=Asked(lora_scale=scale))

    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    unchanged = from_diffusers(pipeline, family)
    pipeline.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
    changed = from_diffusers(pipeline, family)

    assert abs(changed - unchanged).max() > 1
    assert abs(pixels(tmp_path / "samples-None" / "000000.png") - changed).max() <= 1
    assert abs(pixels(tmp_path / "samples-0.0" / "000000.png") - unchanged).max() <= 1
    with safe_open(run / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata()
        has_text = any(key.startswith("text_encoder") for key in list(file.keys()))
    assert (about["license"], about["step"], about["base_model"]) == ("CC0-1.0", "2", str(base))
    assert yaml.safe_load(about["recipe"])["adapter"]["rank"] == 2
    assert has_text == text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_fine_tune_is_a_whole_pipeline(pipelines, tmp_path, family):
    assert (
        train(
            str(recipe(tmp_path, family, pipelines(family), adapter=None, optimizer={"lr": 1e-3}))
        )
        == 0
    )
    sample_run(str(tmp_path / "run"), 1, str(tmp_path / "samples"))

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")

    assert (
        abs(pixels(tmp_path / "samples" / "000000.png") - from_diffusers(pipeline, family)).max()
        <= 1
    )
    trained = "unet" if (tmp_path / "run" / "pipeline" / "unet").is_dir() else "transformer"
    (file,) = (tmp_path / "run" / "pipeline" / trained).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["step"] == "2"
        assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize("text", [False, True])
def test_a_merged_lora_draws_what_the_run_samples(pipelines, tmp_path, text):
    base = pipelines("stable_diffusion")
    adapter = {"type": "lora", "rank": 2, "text_encoders": text}
    assert train(str(recipe(tmp_path, "stable_diffusion", base, adapter=adapter))) == 0
    asked = Asked(lora_scale=0.5, loras=[f"{tmp_path / 'run' / 'lora'}:0.7"])
    sample_run(str(tmp_path / "run"), 1, str(tmp_path / "samples"), asked=asked)

    merge_run(str(tmp_path / "run"), str(tmp_path / "merged"), asked=asked)

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    assert (
        abs(
            pixels(tmp_path / "samples" / "000000.png")
            - from_diffusers(pipeline, "stable_diffusion")
        ).max()
        <= 1
    )
    with pytest.raises(InputError, match="is not empty"):
        merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))


def test_a_run_without_a_lora_has_nothing_to_merge(pipelines, tmp_path):
    assert (
        train(
            str(recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"), adapter=None))
        )
        == 0
    )

    with pytest.raises(
        InputError,
        match=(
            r"the run did not train a LoRA, and no --lora is given; its result is in "
            r".*pipeline already"
        ),
    ):
        merge_run(str(tmp_path / "run"), str(tmp_path / "merged"))


def test_a_lora_file_that_does_not_reproduce_the_network_is_no_result(
    pipelines, tmp_path, monkeypatch
):
    """A file of other weights than the trained ones: each value is 1 % too large."""

    def save(denoiser: Any, folder: Path, metadata: dict[str, str]) -> Path:
        file = save_lora(denoiser, folder, metadata)
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        save_file({name: 1.01 * value for name, value in load_file(file).items()}, file, header)
        return file

    monkeypatch.setattr("difftrain.run.export.save_lora", save)
    with pytest.raises(
        RuntimeError,
        match=(
            r"does not reproduce the trained network: in a freshly loaded model, outputs differ "
            r"by .* of their largest value"
        ),
    ):
        train(str(recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains_beside_a_half_precision_base_is_float32_and_comes_back(
    pipelines, tmp_path, family
):
    model = {
        "type": family,
        "path": str(pipelines(family)),
        "dtype": "bfloat16",
        "text_dtype": "float32",
    }
    adapter = {"type": "lora", "rank": 2, "text_encoders": True}

    assert (
        train(str(recipe(tmp_path, family, pipelines(family), model=model, adapter=adapter))) == 0
    )

    weights = saved(tmp_path / "run")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(name.startswith("text.") for name in weights)


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("stable_diffusion", ["conv_in.*", "time_embedding.*", "conv_norm_out.*", "conv_out.*"]),
        ("stable_diffusion_xl", ["conv_in.*", "add_embedding.*"]),
        ("stable_diffusion_3", ["pos_embed.proj.*", "context_embedder.*", "proj_out.*"]),
        ("flux", ["x_embedder.*", "time_text_embed.*", "proj_out.*"]),
    ],
)
def test_the_first_and_the_last_layers_of_a_half_precision_model_train_by_their_names(
    pipelines, tmp_path, family, patterns
):
    model = {"type": family, "path": str(pipelines(family)), "dtype": "bfloat16"}

    assert (
        train(
            str(
                recipe(
                    tmp_path,
                    family,
                    pipelines(family),
                    model=model,
                    adapter={"type": "named", "patterns": patterns},
                )
            )
        )
        == 0
    )

    weights = saved(tmp_path / "run")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(
        any(fnmatch(name.removeprefix("model."), pattern) for name in weights)
        for pattern in patterns
    )


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
def test_a_t5_that_trains_is_saved_resumed_and_exported(pipelines, tmp_path, family):
    """Its embedding has two names."""
    folder = {"stable_diffusion_3": "text_encoder_3", "flux": "text_encoder_2"}[family]
    training = {"steps": 2, "batch_size": 4, "log_every": 1, "num_sampled": 1}
    for name, steps in (("straight", [2]), ("run", [1, 2])):
        file = recipe(
            tmp_path,
            family,
            pipelines(family),
            adapter={"type": "full", "text_encoders": True},
            captions=None,
            training=training,
            ema={"type": "decay", "decay": 0.5},
        )
        for step in steps:
            assert train(str(file), [f"training.steps={step}", f"output={tmp_path / name}"]) == 0

    one, other = saved(tmp_path / "straight"), saved(tmp_path / "run")
    assert_identical(one["model"], other["model"])
    exported = (
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
        .components[folder]
        .state_dict()
    )
    assert torch.equal(
        exported["shared.weight"], other["ema"][f"text.encoders.{folder}.shared.weight"]
    )
    base = (
        diffusers.DiffusionPipeline.from_pretrained(pipelines(family))
        .components[folder]
        .state_dict()
    )
    assert not torch.equal(exported["shared.weight"], base["shared.weight"])


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "rank": 2}])
def test_a_class_conditional_transformer_is_fine_tuned_too(pipelines, tmp_path, adapter):
    """A DiT's pipeline folder, for which diffusers has no LoRA loader, but difftrain has one."""
    base, data = pipelines("dit", num_classes=2), photos(tmp_path / "photos")
    for i, file in enumerate(sorted(data.glob("*.png"))):
        (data / str(i % 2)).mkdir(exist_ok=True)
        file.rename(data / str(i % 2) / file.name)
    file = recipe(
        tmp_path,
        "dit",
        base,
        adapter=adapter,
        captions=None,
        data={"type": "image_folder", "path": str(data), "labels": "folders"},
        sampling={"sampler": {"type": "ddim", "steps": 2}},
        objective={"variance": {"type": "learned_range"}},
    )

    assert train(str(file)) == 0
    sample_run(str(tmp_path / "run"), 2, str(tmp_path / "samples"))

    if adapter is None:
        assert (tmp_path / "run" / "pipeline" / "vae").is_dir()
    else:
        sample_run(str(tmp_path / "run"), 2, str(tmp_path / "base"), asked=Asked(lora_scale=0.0))
        assert (
            pixels(tmp_path / "samples" / "000000.png") != pixels(tmp_path / "base" / "000000.png")
        ).any()


def test_a_single_file_is_fine_tuned_as_its_folder_is(pipelines, tmp_path):
    folder = pipelines("stable_diffusion")
    write_single_file(folder, tmp_path / "model.safetensors")
    model = {
        "type": "stable_diffusion",
        "path": str(tmp_path / "model.safetensors"),
        "config": str(folder),
    }
    for name, changes in (("file", {"model": model}), ("folder", {})):
        assert (
            train(
                str(
                    recipe(
                        tmp_path, "stable_diffusion", folder, **changes, output=str(tmp_path / name)
                    )
                )
            )
            == 0
        )

    assert_identical(saved(tmp_path / "file")["model"], saved(tmp_path / "folder")["model"])


@pytest.mark.parametrize("captions", ["sidecar", "none"])
def test_a_text_to_image_run_is_scored(pipelines, tmp_path, captions):
    """Against images with captions, which the held-out loss needs too, and without."""
    held_out = photos(tmp_path / "held_out", size=(20, 20))
    evaluation = {
        "features": "pixels",
        "metrics": ["frechet_distance"],
        "num_samples": 4,
        "reference": {"type": "image_folder", "path": str(held_out), "captions": captions},
    }
    file = recipe(
        tmp_path, "stable_diffusion", pipelines("stable_diffusion"), evaluation=evaluation
    )

    assert train(str(file)) == 0

    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]
    assert scores["frechet_distance"]["value"] > 0
    assert (tmp_path / "run" / "diagnostics.json").exists() == (captions == "sidecar")


def test_classes_of_a_text_to_image_run_cannot_be_scored(pipelines, tmp_path, capsys):
    data = {"type": "image_folder", "path": str(photos(tmp_path / "held_out"))}
    evaluation = {
        "features": "pixels",
        "metrics": ["class_agreement"],
        "num_samples": 4,
        "reference": data,
    }

    assert (
        train(
            str(
                recipe(
                    tmp_path,
                    "stable_diffusion",
                    pipelines("stable_diffusion"),
                    evaluation=evaluation,
                )
            )
        )
        == 2
    )
    assert "error: " in capsys.readouterr().err


def test_a_prompt_of_the_command_line_is_what_is_drawn(pipelines, tmp_path):
    assert train(str(recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion")))) == 0
    run = str(tmp_path / "run")
    sample_run(run, 2, str(tmp_path / "own"))
    sample_run(run, 2, str(tmp_path / "asked"), asked=Asked(prompts=["a dog", PROMPT]))
    sample_run(run, 2, str(tmp_path / "same"), asked=Asked(prompts=[PROMPT, "a dog"]))

    assert (
        pixels(tmp_path / "own" / "000000.png") == pixels(tmp_path / "same" / "000000.png")
    ).all()
    assert (
        pixels(tmp_path / "own" / "000000.png") != pixels(tmp_path / "asked" / "000000.png")
    ).any()


@pytest.mark.parametrize("text", [False, True])
def test_a_stopped_lora_resumes_bit_for_bit(pipelines, tmp_path, text):
    """With the average of the weights and the running mean of step_variation."""
    changes: dict[str, Any] = {
        "adapter": {"type": "lora", "rank": 2, "dropout": 0.3, "text_encoders": text},
        "ema": {"type": "decay", "decay": 0.9},
        "objective": {"regularizers": [{"type": "step_variation", "weight": 1.0}]},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "num_sampled": 1,
        },
    }
    base = pipelines("stable_diffusion_xl")
    straight = recipe(
        tmp_path, "stable_diffusion_xl", base, **changes, output=str(tmp_path / "straight")
    )
    assert train(str(straight)) == 0
    assert train(str(straight), [f"output={tmp_path / 'run'}", "training.steps=2"]) == 0
    assert train(str(straight), [f"output={tmp_path / 'run'}"], accept_changes=True) == 0

    one, other = saved(tmp_path / "straight"), saved(tmp_path / "run")
    assert_identical(one, other)
    assert set(one["model"]) == set(one["ema"])
    assert all("lora" in name for name in one["model"])
    assert float(one["state"]["objective"]["regularizers.step_variation.mean_variation"]) > 0
    assert torch.isfinite(torch.stack([value.abs().sum() for value in one["model"].values()])).all()
