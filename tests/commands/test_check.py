"""What `difftrain check` says of a fine-tuning recipe, without weights, against the run itself."""

import json
import re

import pytest
import torch
from helpers.commands import command
from helpers.fine_tuning import photos, recipe
from helpers.runs import tiny
from safetensors.torch import load_file

from difftrain.models.pipelines.pretrained import PretrainedPipeline
from difftrain.run.checking import check, hub_ids

ADAPTERS = [
    {"type": "lora", "rank": 2, "text_encoders": True},
    {"type": "dora", "rank": 2},
    {"type": "named", "patterns": ["*.to_k.weight"]},
]


def checked(*arguments):
    """Return the lines of the command by their names."""
    return dict(re.findall(r"^(\w+) +(.*)$", command("check", *arguments).out, re.MULTILINE))


def mebibytes(text):
    return float(re.search(r"([\d.]+) MiB", text)[1])


@pytest.mark.parametrize(
    "adapter", [*ADAPTERS, None], ids=lambda adapter: str(adapter and adapter["type"])
)
def test_it_says_what_a_run_trains_and_how_large_its_checkpoints_are(
    pipelines, tmp_path, monkeypatch, adapter
):
    """A checkpoint holds what trains, and Adam's two moments of it."""
    file = recipe(
        tmp_path, "stable_diffusion_xl", pipelines("stable_diffusion_xl"), adapter=adapter
    )
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedPipeline, "load", of_vae_alone(PretrainedPipeline.load))
        lines = checked(file)
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


def test_it_shows_prompts_and_captions(pipelines, tmp_path):
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))

    lines = checked(file, "sampling.prompts=[a, b, c, d, e]")
    assert lines["data"] == "8 images of 3x16x16, captions, can be guided"
    assert lines["prompts"] == "'a', 'b', 'c' and 2 more"
    assert lines["adapter"] == "LoRA of rank 2 on 32 layers: 1,376 of 53,380 parameters train"
    assert lines["memory"].endswith("activations, VAE and text encoders on top")
    assert (
        checked(file, "sampling.prompts=null")["prompts"]
        == "'a photo of thing 0', 'a photo of thing 1', 'a photo of thing 2' and 5 more"
    )


def test_it_shows_buckets_the_cache_and_what_is_cut_off_as_a_run_does(
    pipelines, tmp_path, monkeypatch
):
    """Of a tokenizer of single letters, which reads 75 and two marks of its own."""
    data = photos(tmp_path / "photos")
    (data / "3.txt").write_text("x" * 100)
    photos(tmp_path / "wide", 2, (8, 32))
    sets = [
        {"type": "image_folder", "path": str(tmp_path / name), "captions": "sidecar"}
        for name in ("photos", "wide")
    ]
    changes = {"data": {"type": "mixed", "sets": sets}, "buckets": {"step": 8, "max_ratio": 4}}
    cache = {"folder": str(tmp_path / "cache"), "latents": False}
    file = recipe(
        tmp_path, "stable_diffusion", pipelines("stable_diffusion"), cache=cache, **changes
    )
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedPipeline, "load", of_vae_alone(PretrainedPipeline.load))
        lines = check(str(file), [f"sampling.prompts=[a dog, {'y' * 80}]"]).splitlines()
        beside = check(str(file), ["prior={num: 2, prompts: [a dog]}"])
    assert not (tmp_path / "cache").exists()

    said = command("train", file, f"sampling.prompts=[a dog, {'y' * 80}]").out.splitlines()
    place = next(place for place, line in enumerate(said) if "height x width" in line)
    cut = [
        line.removeprefix("text: ")
        for line in said
        if line.startswith("text: ") and "longer" in line
    ]
    place_of_table = lines.index(f"buckets    {said[place]}")
    assert lines[place_of_table + 1 : place_of_table + 4] == [
        " " * 11 + row for row in said[place + 1 : place + 4]
    ]
    assert [row.split()[3] for row in said[place + 1 : place + 3]] == ["8", "2"]
    assert "one prior sample for each image is added at 16 x 16" in beside
    assert cut == [
        (
            "1 of 10 captions is longer than the 77 tokens that the text_encoder reads; the "
            "rest of them is not seen"
        ),
        (
            "1 of 2 sampling.prompts is longer than the 77 tokens that the text_encoder reads; "
            "the rest of them is not seen"
        ),
    ]
    assert lines[place_of_table + 4 : place_of_table + 7] == [
        f"text       {cut[0]}",
        f"           {cut[1]}",
        f"cache      {tmp_path / 'cache'}: latents not cached, text cached",
    ]


def test_images_that_metadata_does_not_list_are_counted_as_a_run_counts_them(pipelines, tmp_path):
    data = photos(tmp_path / "photos")
    listed = [json.dumps({"file_name": f"{i}.png", "text": f"thing {i}"}) for i in range(6)]
    (data / "metadata.jsonl").write_text("\n".join(listed))
    changes = {"data": {"type": "image_folder", "path": str(data), "captions": "metadata"}}
    file = recipe(
        tmp_path,
        "stable_diffusion",
        pipelines("stable_diffusion"),
        training={"steps": 1, "batch_size": 4},
        **changes,
    )

    counts = "6 items are read, 2 are left out"
    reason = "      2  metadata.jsonl does not list it (the first: 6.png)"
    assert checked(file)["read"] == counts
    assert reason in command("check", file).out
    told = command("train", file).out.splitlines()
    assert told.count(f"data: {counts}") == told.count(f"data: {reason}") == 1
    (data / "metadata.jsonl").write_text(
        "\n".join([*listed, *(json.dumps({"file_name": f"{i}.png", "text": "x"}) for i in (6, 7))])
    )
    assert "read" not in checked(file)


def test_a_frozen_half_precision_base_takes_half_the_memory(pipelines, tmp_path):
    """52,004 numbers in float32 or in bfloat16, beside a LoRA that is in float32 either way."""
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))
    large = ["adapter.rank=4", "adapter.targets=all_linear"]
    of_dtype = {
        dtype: checked(file, f"model.dtype={dtype}", *large) for dtype in ("float32", "bfloat16")
    }
    trained = int(re.search(r": ([\d,]+) of", of_dtype["float32"]["adapter"])[1].replace(",", ""))

    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert mebibytes(of_dtype[dtype]["memory"]) == pytest.approx(
            (size * 52_004 + 16 * trained) / 2**20, abs=0.006
        )
    assert 2 * trained / 2**20 > 0.006


def test_hub_ids_of_a_pipeline_and_of_the_configs_beside_a_single_file_would_be_fetched():
    assert hub_ids({"model": {"type": "stable_diffusion", "path": "org/name", "config": None}}) == [
        "org/name"
    ]
    assert hub_ids(
        {"model": {"type": "flux", "path": "./flux.safetensors", "config": "org/flux"}}
    ) == ["org/flux"]
    assert (
        hub_ids(
            {
                "model": {"type": "flux", "path": "./flux"},
                "data": {"type": "image_folder", "path": "my/photos"},
            }
        )
        == []
    )


def test_code_that_a_recipe_brings_is_named(tmp_path, monkeypatch):
    own = {"imports": ["helpers.own_method"], "objective__regularizers": [{"type": "own_method"}]}

    assert checked(tiny(tmp_path, **own))["code"].startswith("imports: helpers.own_method. This")
    assert "code" not in checked(tiny(tmp_path))
    script = torch.jit.script(torch.nn.Flatten())
    torch.jit.save(script, tmp_path / "features.pt")
    evaluation = {
        "features": {
            "type": "torchscript",
            "path": str(tmp_path / "features.pt"),
            "range": "0..1",
        },
        "reference": {"type": "digits", "part": "held_out"},
        "metrics": ["frechet_distance"],
        "num_samples": 99,
    }
    told = checked(tiny(tmp_path, evaluation=evaluation))["code"]
    assert told == (
        f"features: torchscript ({tmp_path}/features.pt). This code can read and write files: run "
        "only what you trust"
    )


def test_a_learning_rate_that_teaches_nothing_is_told(tmp_path):
    told = checked(tiny(tmp_path, lr_schedule={"type": "cosine", "warmup": 0}))["lr"]
    assert told.startswith("the learning rate of the last step is 0")
    told = checked(tiny(tmp_path, lr_schedule={"type": "constant", "warmup": 60}))["lr"]
    assert told.startswith("warmup: 60 steps are more than the 6 of the run")
