"""Batches from pixels and captions, and from a cache: they are the same, without the encoders."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from helpers.commands import refused
from helpers.fine_tuning import photos, recipe
from helpers.runs import lines
from safetensors.torch import load_file, save_file

from difftrain.core.rng import Rng
from difftrain.objective.types import Batch
from difftrain.recipe.reading import load
from difftrain.run.session import Plans, TrainingRun
from difftrain.run.training import Launch
from difftrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_report")

CPU = torch.device("cpu")


def plans_of(file: Path, *overrides: str) -> Plans:
    """Return what a run of the recipe in one process is built from."""
    return Plans(load(file, overrides), Launch())


def batches(file: Path, *overrides: str, steps: int = 3) -> list[Batch]:
    """Return the batches of the first steps."""
    plans = plans_of(file, *overrides)
    prepare, seed = plans.model.preparation, plans.recipe.seed
    micro_batches = plans.data.loader(0, 1).batches(0)
    found = []
    for _ in range(steps):
        micro = next(micro_batches)
        rng = Rng(seed, micro.step, micro.samples, 4)
        found.append(prepare(micro, rng, CPU, torch.float32))
    return found


def assert_same(one: Batch, other: Batch) -> None:
    """Compare batches; a VAE and a text encoder round differently in batches of another size."""
    assert one.cond.keys() == other.cond.keys()
    torch.testing.assert_close(one.x0, other.x0, rtol=1e-4, atol=1e-5)
    for name, value in one.cond.items():
        torch.testing.assert_close(value, other.cond[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
)
def test_a_cache_changes_nothing_in_a_batch(pipelines, tmp_path, family):
    """Latents from the posterior, states of captions, some of them dropped; sizes and guidance."""
    model = {"type": family, "path": str(pipelines(family))}
    if family == "flux":
        model["guidance_in_training"] = 2.5
    file = recipe(tmp_path, family, pipelines(family), model=model, captions={"dropout": 0.5})

    plain, cached = batches(file), batches(file, f"cache={{folder: {tmp_path / 'cache'}}}")

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    assert plain[0].x0.shape == (4, *plans_of(file).model.shape)
    if family == "stable_diffusion_xl":
        dropped = torch.cat([(batch.cond["text_embeds"] == 0).all(dim=1) for batch in cached])
        assert 0 < dropped.sum() < len(dropped)
        assert cached[0].cond["sizes"][0].tolist() == [24, 20, 1, 0, 16, 16]
    if family == "flux":
        assert cached[0].cond["guidance"].tolist() == [2.5] * 4


def test_a_cache_changes_nothing_in_a_batch_of_a_bucket(pipelines, tmp_path):
    data = photos(tmp_path / "photos", 6)
    photos(tmp_path / "photos" / "wide", 6, size=(16, 32))
    file = recipe(
        tmp_path, "stable_diffusion_xl", pipelines("stable_diffusion_xl"), buckets={"step": 4}
    )

    plain = batches(file, steps=6)
    cached = batches(file, f"cache={{folder: {tmp_path / 'cache'}}}", steps=6)

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    assert len({tuple(batch.x0.shape) for batch in cached}) == 2
    assert data.is_dir()


def test_text_encoders_that_train_get_token_ids(pipelines, tmp_path):
    adapter = {"type": "lora", "rank": 2, "text_encoders": True}
    file = recipe(
        tmp_path,
        "stable_diffusion_xl",
        pipelines("stable_diffusion_xl"),
        adapter=adapter,
        captions={"dropout": 0.5},
    )

    plain = batches(file)
    cached = batches(file, f"cache={{folder: {tmp_path / 'cache'}, text: false}}")

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    ids = plain[0].cond
    assert sorted(ids) == ["ids.empty", "ids.text_encoder", "ids.text_encoder_2", "sizes"]
    tokenizer = plans_of(file).model.model.tokenizer.tokenizers["tokenizer"]
    rows = ids["ids.text_encoder"]
    words = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert [word == "" for word in words] == ids["ids.empty"].tolist()
    assert all(word == "" or word.replace(" ", "").startswith("aphotoofthing") for word in words)


# Who is called during training


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the VAE's halves and of text encoders, by (class, where).

    Where is "step", "callback", "run" for the rest of training, or "outside".
    """
    counted: Counter[tuple[str, str]] = Counter()
    where = ["outside"]

    def during(name: str, method: str) -> None:
        real = getattr(Trainer, method)

        def call(self: Trainer, *given: Any) -> Any:
            where.append(name)
            try:
                return real(self, *given)
            finally:
                where.pop()

        monkeypatch.setattr(Trainer, method, call)

    def count(module: Any, given: Any, output: Any) -> None:
        if type(module).__name__ in (
            "Encoder",
            "Decoder",
            "CLIPTextModel",
            "CLIPTextModelWithProjection",
        ):
            counted[type(module).__name__, where[-1]] += 1

    for name, method in (("run", "run"), ("step", "step"), ("callback", "_call_back")):
        during(name, method)
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield counted
    handle.remove()


def seen_often(folder: Path, base: Path, **changes: Any) -> Path:
    """Write a recipe of four steps of two micro-batches, with samples and a held-out loss.

    Both come at every second step, and have prompts of their own.
    """
    held_out = {
        "type": "image_folder",
        "path": str(photos(folder / "held_out", 3)),
        "captions": "sidecar",
    }
    training = {
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
        "sample_every": 2,
        "num_sampled": 2,
    }
    validation = {"data": held_out, "every": 2, "num_timesteps": 2}
    return recipe(
        folder, "stable_diffusion_xl", base, training=training, validation=validation, **changes
    )


def test_with_a_cache_training_calls_no_vae_and_no_text_encoder(pipelines, tmp_path, calls):
    """The VAE decodes samples. All else was encoded before, and the text encoders are gone."""
    file = seen_often(
        tmp_path, pipelines("stable_diffusion_xl"), cache={"folder": str(tmp_path / "cache")}
    )
    run = TrainingRun(load(file))

    assert run() == 0

    assert {kind for kind, where in calls if where in ("step", "run")} == set()
    assert {kind for kind, where in calls if where == "callback"} == {"Decoder"}
    assert calls["CLIPTextModel", "outside"] > 0
    assert "text" not in vars(run.plans.model.model.pipeline)
    assert len(lines(tmp_path / "run" / "validation.jsonl")) == 2


def test_without_a_cache_each_micro_batch_is_encoded_once(pipelines, tmp_path, calls):
    assert TrainingRun(load(seen_often(tmp_path, pipelines("stable_diffusion_xl"))))() == 0

    assert calls["Encoder", "step"] == calls["CLIPTextModelWithProjection", "step"] == 8
    assert calls["Decoder", "step"] == 0


@pytest.mark.parametrize("kept", ["latents", "text"])
def test_what_alone_is_cached_is_alone_not_called(pipelines, tmp_path, calls, kept):
    cache = {"folder": str(tmp_path / "cache"), "latents": False, "text": False, kept: True}
    file = seen_often(tmp_path, pipelines("stable_diffusion_xl"), cache=cache)

    assert TrainingRun(load(file))() == 0

    assert (calls["Encoder", "step"] > 0) == (kept == "text")
    assert (calls["CLIPTextModel", "step"] > 0) == (kept == "latents")


# An autoencoder that overflows


def overflowing(pipeline: Path, place: Path) -> Path:
    """Copy a pipeline, whose VAE then overflows in float16 on white, but not on grey."""
    shutil.copytree(pipeline, place)
    file = place / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"][:], weights["encoder.conv_in.bias"][:] = 3e4, 0.0
    save_file(weights, file, {"format": "pt"})
    return place


def greys_and_one_white(folder: Path, white: int, num: int = 12) -> dict[str, Any]:
    folder.mkdir()
    for i in range(num):
        grey = 255 if i == white else 127
        PIL.Image.new("RGB", (16, 16), (grey, grey, grey)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"thing {i}")
    return {"type": "image_folder", "path": str(folder), "captions": "sidecar"}


@pytest.mark.parametrize(
    ("white", "steps"), [(6, 0), (5, None)]
)  # each second and third of 12 images is tried before
def test_without_a_cache_the_image_whose_latents_overflow_is_named(
    pipelines, tmp_path, white, steps
):
    base = overflowing(pipelines("stable_diffusion"), tmp_path / "base")
    encoder = {"type": "vae", "path": str(base / "vae"), "dtype": "float16"}
    file = recipe(
        tmp_path,
        "stable_diffusion",
        base,
        encoder=encoder,
        data=greys_and_one_white(tmp_path / "greys", white),
        training={"steps": 20, "batch_size": 4, "log_every": 1, "num_sampled": 0},
    )

    message = refused("train", file)

    image = tmp_path / "greys" / f"{white:02d}.png"
    assert f"the latents of {image} are not finite with the VAE in float16" in message
    assert "Write encoder: {type: vae, path: " in message
    if steps == 0:
        assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_autoencoder_of_no_numbers_is_refused_before_a_step_is_trained(pipelines, tmp_path):
    base = overflowing(pipelines("stable_diffusion"), tmp_path / "base")
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: value * float("nan") for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})

    message = refused("train", recipe(tmp_path, "stable_diffusion", base))

    said = "are not finite with the VAE in float32. Look at the images, and at the VAE's weights"
    assert said in message
