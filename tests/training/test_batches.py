"""What training is fed, from pixels and captions or from a cache: the same batches, and from a cache without the encoders."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from difftrain.run.plan import Plan
from helpers.commands import refused
from helpers.fine_tuning import photos, recipe
from helpers.runs import lines
from safetensors.torch import load_file, save_file

from difftrain.commands.train import Run
from difftrain.core.rng import Rng
from difftrain.objective.types import Batch
from difftrain.recipe.reading import load
from difftrain.run.data import loader_of
from difftrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_report")

CPU = torch.device("cpu")


def batches(file: Path, *overrides: str, steps: int = 3) -> list[Batch]:
    """The batches of the first steps."""
    plan = Plan(load(file, overrides))
    micro_batches = loader_of(plan, 0, 1).batches(0)
    micro = [next(micro_batches) for _ in range(steps)]
    return [
        plan.preparation(m, Rng(plan.recipe.seed, m.step, m.samples, 4), CPU, torch.float32)
        for m in micro
    ]


def assert_same(one: Batch, other: Batch) -> None:
    """Up to what a VAE and a text encoder make of batches of another size."""
    assert one.cond.keys() == other.cond.keys()
    for found, expected in [
        (one.x0, other.x0),
        *((one.cond[name], other.cond[name]) for name in one.cond),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
)
def test_a_cache_changes_nothing_in_a_batch(pipelines, tmp_path, family):
    """Latents drawn from the posterior, states of captions that are dropped now and then, sizes and guidance."""
    model = {
        "type": family,
        "path": str(pipelines(family)),
        **({"guidance_in_training": 2.5} if family == "flux" else {}),
    }
    file = recipe(tmp_path, family, pipelines(family), model=model, captions={"dropout": 0.5})

    plain, cached = batches(file), batches(file, f"cache={{folder: {tmp_path / 'cache'}}}")

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    assert plain[0].x0.shape == (4, *Plan(load(file)).shape)
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

    plain, cached = (
        batches(file, steps=6),
        batches(file, f"cache={{folder: {tmp_path / 'cache'}}}", steps=6),
    )

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    assert len({tuple(batch.x0.shape) for batch in cached}) == 2
    assert data.is_dir()


def test_text_encoders_that_train_are_given_token_ids(pipelines, tmp_path):
    adapter = {"type": "lora", "rank": 2, "text_encoders": True}
    file = recipe(
        tmp_path,
        "stable_diffusion_xl",
        pipelines("stable_diffusion_xl"),
        adapter=adapter,
        captions={"dropout": 0.5},
    )
    plan = Plan(load(file))

    plain, cached = (
        batches(file),
        batches(file, f"cache={{folder: {tmp_path / 'cache'}, text: false}}"),
    )

    for one, other in zip(plain, cached, strict=True):
        assert_same(one, other)
    ids = plain[0].cond
    assert sorted(ids) == ["ids.empty", "ids.text_encoder", "ids.text_encoder_2", "sizes"]
    words = [
        plan.pipeline.tokenize.tokenizers["tokenizer"].decode(row, skip_special_tokens=True)
        for row in ids["ids.text_encoder"]
    ]
    assert [word == "" for word in words] == ids["ids.empty"].tolist()
    assert all(word == "" or word.replace(" ", "").startswith("aphotoofthing") for word in words)


# Who is called during training


@pytest.fixture
def calls(monkeypatch):
    """How often the VAE's halves and text encoders were run, by (class, where): in a step, in a visit, or outside of training."""
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

    for name, method in (("run", "run"), ("step", "step"), ("visit", "_visit")):
        during(name, method)
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield counted
    handle.remove()


def seen_often(folder: Path, base: Path, **changes: Any) -> Path:
    """Four steps of two micro-batches, with samples and a held-out loss at every second one, and other prompts in each."""
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
    """The VAE draws samples; held-out images and the prompts of both were encoded before, and the text encoders are gone."""
    file = seen_often(
        tmp_path, pipelines("stable_diffusion_xl"), cache={"folder": str(tmp_path / "cache")}
    )
    run = Run(load(file))

    assert run() == 0

    assert {kind for kind, where in calls if where in ("step", "run")} == set()
    assert {kind for kind, where in calls if where == "visit"} == {"Decoder"}
    assert calls["CLIPTextModel", "outside"] > 0
    assert "text" not in vars(run.plan.pipeline)
    assert len(lines(tmp_path / "run" / "validation.jsonl")) == 2


def test_without_a_cache_each_micro_batch_is_encoded_once(pipelines, tmp_path, calls):
    assert Run(load(seen_often(tmp_path, pipelines("stable_diffusion_xl"))))() == 0

    assert calls["Encoder", "step"] == calls["CLIPTextModelWithProjection", "step"] == 8
    assert calls["Decoder", "step"] == 0


@pytest.mark.parametrize("kept", ["latents", "text"])
def test_what_alone_is_cached_is_alone_not_called(pipelines, tmp_path, calls, kept):
    cache = {
        "folder": str(tmp_path / "cache"),
        **{name: name == kept for name in ("latents", "text")},
    }

    assert Run(load(seen_often(tmp_path, pipelines("stable_diffusion_xl"), cache=cache)))() == 0

    assert (calls["Encoder", "step"] > 0) == (kept == "text")
    assert (calls["CLIPTextModel", "step"] > 0) == (kept == "latents")


# An autoencoder that overflows


def overflowing(pipeline: Path, place: Path) -> Path:
    """A pipeline whose VAE makes infinities of white in float16, and of grey numbers."""
    shutil.copytree(pipeline, place)
    file = place / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"][:], weights["encoder.conv_in.bias"][:] = 3e4, 0.0
    save_file(weights, file, {"format": "pt"})
    return place


def greys_and_one_white(folder: Path, white: int, num: int = 12) -> dict[str, Any]:
    folder.mkdir()
    for i in range(num):
        PIL.Image.new("RGB", (16, 16), (255 if i == white else 127,) * 3).save(
            folder / f"{i:02d}.png"
        )
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

    assert (
        f"the latents of {tmp_path / 'greys' / f'{white:02d}.png'} are not finite with the VAE in float16"
        in message
    )
    assert "write encoder: {type: vae, path: " in message
    if steps == 0:
        assert (
            not (tmp_path / "run" / "log.jsonl").exists()
            or lines(tmp_path / "run" / "log.jsonl") == []
        )


def test_an_autoencoder_of_no_numbers_is_refused_before_a_step_is_trained(pipelines, tmp_path):
    base = overflowing(pipelines("stable_diffusion"), tmp_path / "base")
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: value * float("nan") for name, value in load_file(file).items()},
        file,
        {"format": "pt"},
    )

    message = refused("train", recipe(tmp_path, "stable_diffusion", base))

    assert (
        "are not finite with the VAE in float32. Look at the images, and at the VAE's weights"
        in message
    )
