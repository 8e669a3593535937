"""What `difftrain check` tells of a fine-tuning recipe, without reading weights, against what a run then is."""

import re

import pytest
from commands import command
from safetensors.torch import load_file
from test_fine_tuning import recipe

from difftrain.check import hub_ids
from difftrain.pipelines.pretrained import PretrainedPipeline

ADAPTERS = [
    {"type": "lora", "rank": 2, "text_encoders": True}, {"type": "dora", "rank": 2}, {"type": "named", "patterns": ["*.to_k.weight"]},
]  # fmt: skip


def told(*arguments):
    """The lines of the command by their names."""
    return dict(re.findall(r"^(\w+) +(.*)$", command("check", *arguments).out, re.MULTILINE))


def mebibytes(text):
    return float(re.search(r"([\d.]+) MiB", text)[1])


@pytest.mark.parametrize("adapter", [*ADAPTERS, None], ids=lambda adapter: str(adapter and adapter["type"]))
def test_it_tells_what_a_run_trains_and_how_large_its_checkpoints_are(pipelines, tmp_path, monkeypatch, adapter):
    """A checkpoint holds what trains, and Adam's two moments of it."""
    file = recipe(tmp_path, "stable_diffusion_xl", pipelines("stable_diffusion_xl"), adapter=adapter)
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedPipeline, "load", of_vae_alone(PretrainedPipeline.load))
        lines = told(file)
    command("train", file)

    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000002"
    trained = sum(value.numel() for value in load_file(checkpoint / "model.safetensors").values())
    assert ("adapter" in lines) == (adapter is not None)
    if adapter is not None:
        assert f": {trained:,} of " in lines["adapter"]
    written = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "state.pt"))
    assert mebibytes(lines["disk"]) == pytest.approx(12 * trained / 2**20, abs=0.006)
    assert written > 12 * trained
    assert mebibytes(lines["memory"]) >= 16 * trained / 2**20 - 0.006


def of_vae_alone(load):
    def only(self, component, *given, **more):
        assert component == "vae", f"{component} was read"
        return load(self, component, *given, **more)

    return only


def test_it_tells_prompts_and_captions(pipelines, tmp_path):
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))

    lines = told(file, "sampling.prompts=[a, b, c, d, e]")
    assert lines["data"] == "8 images of 3x16x16, captions, can be guided"
    assert lines["prompts"] == "'a', 'b', 'c' and 2 more"
    assert lines["adapter"] == "LoRA of rank 2 on 32 layers: 1,376 of 53,380 parameters train"
    assert lines["memory"].endswith("activations, VAE and text encoders on top")
    assert told(file, "sampling.prompts=null")["prompts"] == "'a photo of thing 0', 'a photo of thing 1', 'a photo of thing 2' and 5 more"


def test_a_frozen_half_precision_base_takes_half_the_memory(pipelines, tmp_path):
    """52,004 numbers in float32 or in bfloat16, beside a LoRA that is in float32 either way."""
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))
    large = ["adapter.rank=4", "adapter.targets=all_linear"]
    of_dtype = {dtype: told(file, f"model.dtype={dtype}", *large) for dtype in ("float32", "bfloat16")}
    trained = int(re.search(r": ([\d,]+) of", of_dtype["float32"]["adapter"])[1].replace(",", ""))

    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert mebibytes(of_dtype[dtype]["memory"]) == pytest.approx((size * 52_004 + 16 * trained) / 2**20, abs=0.006)
    assert 2 * trained / 2**20 > 0.006


def test_hub_ids_of_a_pipeline_and_of_the_configs_beside_a_single_file_would_be_fetched():
    assert hub_ids({"model": {"type": "stable_diffusion", "path": "org/name", "config": None}}) == ["org/name"]
    assert hub_ids({"model": {"type": "flux", "path": "./flux.safetensors", "config": "org/flux"}}) == ["org/flux"]
    assert hub_ids({"model": {"type": "flux", "path": "./flux"}, "data": {"type": "image_folder", "path": "my/photos"}}) == []
