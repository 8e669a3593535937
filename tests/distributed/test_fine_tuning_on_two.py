"""Fine-tuning on two processes against one: LoRAs of the denoiser and of text encoders."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fine_tuning import photos, recipe
from helpers.places import PROGRAMS
from helpers.runs import largest_difference, lines, saved, trained
from helpers.several import run_program
from helpers.support import assert_close

pytestmark = pytest.mark.distributed

RUNS = ("frozen_text", "trained_text", "prior")


def recipes(folder: Path, base: Path, processes: int) -> dict[str, Path]:
    """Write recipes by name, in float64 but for the VAE, whose latents come from a cache.

    One has a LoRA in buckets and a regularizer with a running mean, one trains the text encoders
    too, and one has samples of the base model beside the data.
    """
    photos(folder / "photos", 6)
    photos(folder / "photos" / "wide", 6, size=(16, 32))
    sampling = {
        "sampler": {"type": "ddim", "steps": 2},
        "guidance": 3.0,
        "block_size": 2,
        "prompts": ["a cat", "a dog"],
    }
    common: dict[str, Any] = {
        "model": {
            "type": "stable_diffusion_xl",
            "path": str(base),
            "dtype": "float64",
            "text_dtype": "float64",
        },
        "captions": {"dropout": 0.3},
        "buckets": {"step": 4},
        "sampling": sampling,
        "ema": {"type": "decay", "decay": 0.9},
        "training": {
            "steps": 4,
            "batch_size": 8,
            "micro_batch_size": 8 // processes,
            "log_every": 2,
            "num_sampled": 3,
            "sample_every": 4,
        },
    }
    variation = {"regularizers": [{"type": "step_variation", "central": True, "step_size": 0.1}]}
    cache = {"folder": str(folder / "cache")}
    changes: dict[str, dict[str, Any]] = {
        "frozen_text": {"cache": cache, "objective": variation},
        "trained_text": {
            "cache": {**cache, "text": False},
            "adapter": {"type": "lora", "rank": 2, "text_encoders": True},
        },
        "prior": {
            "cache": cache,
            "prior": {"num": 5, "weight": 0.5, "prompts": ["a dog", "a bird"]},
        },
    }
    made = {}
    for name in RUNS:
        (folder / name).mkdir()
        (folder / name / "photos").symlink_to(folder / "photos")
        made[name] = recipe(
            folder / name, "stable_diffusion_xl", base, **{**common, **changes[name]}
        )
    return made


@pytest.fixture(scope="module")
def two(pipelines, tmp_path_factory):
    """The folder of all runs on two processes."""
    folder = tmp_path_factory.mktemp("two")
    recipes(folder, pipelines("stable_diffusion_xl"), 2)
    run_program(PROGRAMS / "fine_tuning.py", folder, *RUNS, num=2)
    assert [json.loads((folder / f"codes-{rank}.json").read_text()) for rank in (0, 1)] == [
        [0] * len(RUNS)
    ] * 2
    return folder


@pytest.fixture(scope="module")
def one(pipelines, tmp_path_factory):
    """The same in this process."""
    folder = tmp_path_factory.mktemp("one")
    for file in recipes(folder, pipelines("stable_diffusion_xl"), 1).values():
        trained(file)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_one_s_lora_and_its_average(two, one, name):
    found, expected = saved(two / name / "run"), saved(one / name / "run")

    for part in ("model", "ema"):
        assert largest_difference(found[part], expected[part]) <= 1e-12
    assert any(key.startswith("text.") for key in expected["model"]) == (name == "trained_text")
    assert (
        max(value.abs().max().item() for key, value in expected["model"].items() if "lora_B" in key)
        > 1e-3
    )


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_logs(two, one, name):
    for found, expected in zip(
        lines(two / name / "run" / "log.jsonl"),
        lines(one / name / "run" / "log.jsonl"),
        strict=True,
    ):
        assert found["terms"].keys() == expected["terms"].keys()
        assert_close(
            list(found["terms"].values()), list(expected["terms"].values()), relative=1e-11
        )


def test_the_running_mean_is_that_of_both(two, one):
    found, expected = (
        saved(folder / "frozen_text" / "run")["state"]["objective"] for folder in (two, one)
    )

    assert expected
    for name, value in expected.items():
        assert_close(found[name], value, relative=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_draw_one_s_samples(two, one, name):
    grid = f"{name}/run/samples/step-0000004.png"

    assert (two / grid).read_bytes() == (one / grid).read_bytes()


def test_two_processes_make_one_s_prior(two, one):
    files = sorted(path.name for path in (one / "prior" / "run" / "prior").glob("*.png"))

    assert len(files) == 5
    for file in files:
        assert (two / "prior" / "run" / "prior" / file).read_bytes() == (
            one / "prior" / "run" / "prior" / file
        ).read_bytes()
