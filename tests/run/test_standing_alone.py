"""A trained run stands on its own: its folder is enough to sample it, to merge it, to score it.

Everything else that the training needed is taken away, and the folder lies in a different place.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from helpers.absences import optimizer_package, without, without_trackers
from helpers.commands import command, pictures, refused
from helpers.fine_tuning import photos, pixels, recipe
from helpers.places import ROOT
from helpers.runs import launched, output_of, tiny
from helpers.tiny_networks import UNLABELLED

pytestmark = pytest.mark.usefixtures("without_report")

pytest.importorskip("tensorboard", reason="the tracker of these runs")
ABSENCES = ["training images", "reference", "optimizer", "tracker", "all of them"]


class Trained:
    """A finished run, the things that it needed, and the samples that it gives with all of them.

    Args:
        folder: The folder of the recipe, of training images and of the reference.
        places: Training images and reference.
    """

    def __init__(self, folder: Path, places: dict[str, Path]):
        self.run, self.places = folder / "run", places
        self.folder = folder

    @contextlib.contextmanager
    def missing(self, absence: str, to: Path):
        """Yield a copy of the run folder while the original and other things are missing.

        The optimizer's package is gone for all of these tests.

        Args:
            absence: What is missing: one of `ABSENCES`.
            to: Where the copy lies.
        """
        copy = shutil.copytree(self.run, to / "copy of a run")
        wanted = list(self.places) if absence == "all of them" else [absence]
        taken = [self.places[name] for name in wanted if name in self.places]
        with contextlib.ExitStack() as stack:
            stack.enter_context(without(self.run, self.folder / "recipe.yaml", *taken))
            if absence in ("tracker", "all of them"):
                stack.enter_context(without_trackers())
            yield copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """A run on images of a folder, scored on others, with a tracker and an imported optimizer."""
    folder = tmp_path_factory.mktemp("images")
    places = {"training images": folder / "photos", "reference": folder / "held_out"}
    pictures(places["training images"], num=12)
    pictures(places["reference"], num=9, size=(9, 9))
    with optimizer_package(folder / "site", "package_of_an_optimizer") as optimizer:
        command(
            "train",
            tiny(
                folder,
                model={"type": "unet2d", "config": {**UNLABELLED, **rgb()}},
                data={"type": "image_folder", "path": str(places["training images"])},
                label_dropout=0.0,
                transform={"resolution": 8},
                training={"steps": 2, "batch_size": 4, "trackers": ["tensorboard"]},
                optimizer={"name": optimizer, "lr": 0.01},
                ema={"type": "decay", "decay": 0.5},
                evaluation=scored(places["reference"]),
            ),
        )
    return Trained(folder, places)


def rgb() -> dict[str, int]:
    return {"in_channels": 3, "out_channels": 3}


def scored(reference: Path, **more: Any) -> dict[str, Any]:
    return {
        "features": "pixels",
        "reference": {"type": "image_folder", "path": str(reference), **more},
        "metrics": ["frechet_distance"],
        "num_samples": 6,
    }


@pytest.fixture(scope="module")
def lora(pipelines, tmp_path_factory) -> Trained:
    """The same for a LoRA, whose base model stays where it is."""
    folder = tmp_path_factory.mktemp("lora")
    places = {"training images": folder / "photos", "reference": folder / "held_out"}
    photos(places["reference"], num=6, size=(16, 16))
    with optimizer_package(folder / "site", "package_of_a_loras_optimizer") as optimizer:
        file = recipe(
            folder,
            "stable_diffusion",
            pipelines("stable_diffusion"),
            optimizer={"name": optimizer, "lr": 0.1},
            evaluation=scored(places["reference"], captions="sidecar"),
            training={"steps": 2, "batch_size": 4, "num_sampled": 1, "trackers": ["tensorboard"]},
        )
        command("train", file)
    return Trained(folder, places)


def samples(run: Path, out: Path) -> list[np.ndarray]:
    """Return the pixels of three samples of a run."""
    command("sample", run, "--num", 3, "--out", out)
    return [pixels(out / f"{i:06d}.png") for i in range(3)]


def test_the_optimizer_is_really_gone(trained, tmp_path):
    """Training needs it, so these tests would fail if sampling did too."""
    with trained.missing("nothing", tmp_path) as run:
        message = refused("train", run / "recipe.yaml", f"output={tmp_path / 'other'}")

    assert "optimizer.name: cannot import 'package_of_an_optimizer.Plain'" in message


@pytest.mark.parametrize("absence", ABSENCES)
def test_a_run_is_sampled(trained, tmp_path, absence):
    expected = samples(trained.run, tmp_path / "expected")

    with trained.missing(absence, tmp_path) as run:
        found = samples(run, tmp_path / "found")

    assert np.array_equal(found, expected)


@pytest.mark.parametrize("absence", ABSENCES)
def test_a_lora_is_sampled_and_merged(lora, tmp_path, absence):
    expected = samples(lora.run, tmp_path / "expected")

    with lora.missing(absence, tmp_path) as run:
        found = samples(run, tmp_path / "found")
        command("merge", run, "--out", tmp_path / "merged")

    assert np.array_equal(found, expected)
    merged = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.unet.named_parameters())


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.parametrize("absence", ["optimizer", "tracker"])
def test_a_run_is_scored_as_in_training(trained, tmp_path, absence):
    expected = evaluation(trained.run)

    with trained.missing(absence, tmp_path) as run:
        command("evaluate", run)
        assert evaluation(run) == expected

    assert set(expected["scores"]) == {"frechet_distance", "nearest_neighbour_ratio"}
    assert "left_out" not in expected


def test_without_training_images_the_memorization_check_says_why_it_is_missing(trained, tmp_path):
    expected = evaluation(trained.run)["scores"]["frechet_distance"]["value"]

    with trained.missing("training images", tmp_path) as run:
        shown = command("evaluate", run).out
        found = evaluation(run)

    assert found["scores"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-9)
    assert set(found["scores"]) == {"frechet_distance"}
    assert set(found["left_out"]) == {"nearest_neighbour_ratio"}
    assert "photos' does not exist" in found["left_out"]["nearest_neighbour_ratio"]
    assert "failed" not in found
    assert "left out: " in shown


def test_a_metric_that_was_asked_for_needs_its_training_images(trained, tmp_path):
    with trained.missing("training images", tmp_path) as run:
        message = refused("evaluate", run, "evaluation.metrics=[nearest_neighbour_ratio]")

    assert "metric 'nearest_neighbour_ratio' needs" in message


def test_without_the_reference_there_is_nothing_to_score(trained, tmp_path):
    with trained.missing("reference", tmp_path) as run:
        assert "held_out' does not exist" in refused("evaluate", run)


@pytest.mark.parametrize("absence", ABSENCES)
def test_a_run_is_diagnosed_on_data_that_are_given(trained, tmp_path, absence):
    held_out = pictures(tmp_path / "others", num=6)

    with trained.missing(absence, tmp_path) as run:
        arguments = ["--which", "{type: denoising_error, num: 6, num_timesteps: 2}"]
        command("diagnose", run, "--data", held_out, *arguments)
        found = json.loads((run / "diagnostics.json").read_text())["denoising_error"]

    assert found["value"] > 0
    assert ("training" in found) == (absence not in ("training images", "all of them"))


# Own modules

OWN = '''
from dataclasses import dataclass

import torch
from torch import nn
from difftrain.models.slots import MODELS


@MODELS.register("{name}")
class Network(nn.Module):
    """One convolution, as a model of somebody's own."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_t, t, cond):
        return self.layer(x_t)
'''


@pytest.mark.distributed
def test_a_run_brings_its_own_modules_along(tmp_path):
    """In processes of their own, the second of which finds neither recipe, module nor package."""
    lab = tmp_path / "lab"
    package = lab / "package_of_mine"
    package.mkdir(parents=True)
    (lab / "module_of_mine.py").write_text(OWN.format(name="module_of_mine"))
    (package / "parts.py").write_text(OWN.format(name="package_of_mine"))
    (package / "__init__.py").write_text("from . import parts\n")
    own = tiny(
        lab,
        output=str(tmp_path / "run"),
        imports=["module_of_mine", "package_of_mine"],
        model={"type": "package_of_mine"},
        label_dropout=0.0,
        training__steps=2,
    )
    given = {"PYTHONPATH": str(ROOT)}
    _, err = output_of(process := launched(["-m", "difftrain.train", str(own)], **given))
    assert process.returncode == 0, err
    shutil.rmtree(lab)
    run = (tmp_path / "run").rename(tmp_path / "moved")

    arguments = ["sample", str(run), "--num", "2", "--out", str(tmp_path / "samples")]
    _, err = output_of(process := launched(["-m", "difftrain", *arguments], **given))

    assert process.returncode == 0, err
    assert len(list((tmp_path / "samples").glob("00*.png"))) == 2
    assert not {"module_of_mine", "package_of_mine"} & set(sys.modules)
