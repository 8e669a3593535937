"""The loss on held-out data during training: it depends on the weights alone, as in diagnose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command
from helpers.fine_tuning import photos, recipe
from helpers.runs import lines, tiny, trained, trainer

from difftrain.training.scores import HeldOutLoss

pytestmark = pytest.mark.usefixtures("without_report")

SETTINGS = {"every": 2, "num": 5, "num_timesteps": 4}
TRAINING = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "num_sampled": 1}


def of_classes(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    data = {"type": "digits", "part": "held_out"}
    changes = {"ema": {"type": "decay", "decay": 0.5}, "training": TRAINING, **changes}
    return tiny(folder, validation={"data": data, **SETTINGS}, **changes), data


def of_prompts(folder: Path, base: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    held_out = folder / "held_out"
    if not held_out.exists():
        photos(held_out, 6)
    data = {"type": "image_folder", "path": str(held_out), "captions": "sidecar"}
    blocks = {"training": TRAINING, "validation": {"data": data, **SETTINGS}, **changes}
    return recipe(folder, "stable_diffusion_xl", base, **blocks), data


@pytest.fixture(params=["classes", "prompts", "cached prompts"])
def made(request, tmp_path, pipelines):
    """Return a function of changes that writes a recipe file, and returns its held-out data too."""

    def file(**changes: Any) -> tuple[Path, dict[str, Any]]:
        if request.param == "classes":
            return of_classes(tmp_path, **changes)
        cache = {}
        if "cached" in request.param:
            cache = {"cache": {"folder": str(tmp_path / "cache")}}
        return of_prompts(tmp_path, pipelines("stable_diffusion_xl"), **cache, **changes)

    return file


def validation(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "validation.jsonl")


def test_it_is_the_denoising_error_of_diagnose(made, tmp_path):
    file, data = made()
    trained(file)
    found = validation(tmp_path / "run")
    assert [record["step"] for record in found] == [2, 4]

    which = "{type: denoising_error, num: 5, num_timesteps: 4}"
    for record in found:
        options = ["--which", which, "--data", json.dumps(data), "--step", record["step"]]
        command("diagnose", tmp_path / "run", *options)
        results = json.loads((tmp_path / "run" / "diagnostics.json").read_text())
        expected = results["denoising_error"]
        for key in ("t", "log_snr", "value", "held_out", "bands"):
            one, other = numbers(record[key]), numbers(expected[key])
            assert torch.allclose(one, other, rtol=1e-6, atol=0), key
    assert found[0]["value"] != found[1]["value"]


def numbers(nested: Any) -> torch.Tensor:
    """Return all numbers in plain data, in order; None is 0."""
    if isinstance(nested, dict):
        nested = [nested[key] for key in sorted(nested)]
    if isinstance(nested, list):
        return torch.cat([numbers(item) for item in nested])
    return torch.tensor([float(nested or 0.0)], dtype=torch.float64)


def test_a_second_look_at_the_same_weights_gives_the_same_numbers_bit_for_bit(made, tmp_path):
    of_run = trainer(made()[0])
    (callback,) = (one for one in of_run.callbacks if isinstance(one, HeldOutLoss))
    of_run.bare.eval()

    for _ in range(2):
        torch.randn(3)  # the global generator does not matter
        callback(of_run.bare, 0, 0.0)

    one, other = validation(tmp_path / "run")
    assert one == other


def test_a_run_that_was_stopped_writes_what_an_unbroken_one_writes(made, tmp_path):
    file, _ = made()
    trained(file)
    stopped = f"output={tmp_path / 'stopped'}"
    trained(file, stopped, "training.steps=2")
    with (tmp_path / "stopped" / "validation.jsonl").open("a") as log:
        # This line came after the checkpoint, from a process that was then killed.
        log.write('{"step": 3}\n')
    trained(file, stopped)

    assert validation(tmp_path / "stopped") == validation(tmp_path / "run")
