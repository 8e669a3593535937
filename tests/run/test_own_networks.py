"""Networks of one's own, as recipes/own/ trains them: train, resume, sample, score, export."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import command
from helpers.places import ROOT
from helpers.runs import assert_identical, launched, lines, output_of, saved
from safetensors import safe_open

from difftrain.evaluation.features import classifier
from difftrain.run.trained import TrainedRun

pytestmark = pytest.mark.usefixtures("without_report")

OWN = ROOT / "recipes" / "own"
CPU = torch.device("cpu")
SMALL = {
    "points": [
        "model.width=16",
        "data.num=200",
        "evaluation.reference.num=60",
        "evaluation.num_samples=50",
        "sampling.sampler.steps=4",
        "sampling.block_size=40",
        "training.batch_size=16",
        "training.num_sampled=30",
    ],
    "digits": [
        "model.width=32",
        "model.num_blocks=1",
        "evaluation.num_samples=80",
        "sampling.sampler.steps=3",
        "sampling.block_size=40",
        "training.batch_size=16",
        "training.num_sampled=10",
        "lr_schedule=constant",
    ],
}
STEPS = ["training.log_every=1", "training.checkpoint_every=2", "training.sample_every=2"]


@pytest.fixture(scope="module", autouse=True)
def quick_classifier():
    """Train the digits' classifier for three steps rather than 300."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifier, "STEPS", 3)
        yield


def train(name: str, run: Path, steps: int) -> Path:
    """Train a recipe of recipes/own, cut down to a few steps; returns the run folder."""
    file = OWN / f"{name}.yaml"
    command("train", file, f"output={run}", f"training.steps={steps}", *SMALL[name], *STEPS)
    return run


@pytest.fixture(scope="module", params=["points", "digits"])
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """The name of a recipe, and the folder of its run of four steps."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train(request.param, folder / "run", 4)


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(trained, tmp_path):
    name, straight = trained
    train(name, tmp_path / "run", 2)
    resumed = train(name, tmp_path / "run", 4)

    assert_identical(saved(resumed), saved(straight))
    log = [line for line in lines(resumed / "log.jsonl") if "loss" in line]
    assert_identical(log, lines(straight / "log.jsonl"))


def test_the_average_is_trained_too(trained):
    _, run = trained
    weights = saved(run)

    assert weights["model"].keys() == weights["ema"].keys()
    assert all(torch.isfinite(value).all() for value in weights["ema"].values())
    pairs = [(weights["model"][name], value) for name, value in weights["ema"].items()]
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_samples_are_of_the_datas_kind(trained, tmp_path):
    name, run = trained
    shown = command("sample", run, "--num", 50, "--out", tmp_path).out
    files = {file.name for file in tmp_path.iterdir()}

    assert "50 samples of step 4 (ema weights)" in shown
    if name == "points":
        assert files == {"samples.npy", "scatter.png", "samples.json"}
        points = np.load(tmp_path / "samples.npy")
        assert (points.shape, points.dtype) == ((50, 2), np.float32)
        assert np.isfinite(points).all()
    else:
        images = {f"{i:06d}.png" for i in range(50)}
        assert files == {*images, "grid.png", "samples.json", "metadata.jsonl"}
        assert PIL.Image.open(tmp_path / "000000.png").size == (8, 8)


def test_more_samples_go_on_where_fewer_ended(trained, tmp_path):
    _, run = trained
    for num in (40, 80):
        command("sample", run, "--num", num, "--out", tmp_path / str(num))

    one, other = tmp_path / "40", tmp_path / "80"
    if (one / "samples.npy").exists():
        few, many = np.load(one / "samples.npy"), np.load(other / "samples.npy")
        assert np.array_equal(few, many[:40])
    else:
        names = [f"{i:06d}.png" for i in range(40)]
        assert all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def test_pictures_are_made_during_training(trained):
    _, run = trained
    names = {file.name for file in (run / "samples").glob("*.png")}

    assert {"step-0000002.png", "step-0000004.png", "final.png"} <= names


def test_the_run_is_scored_and_scored_again(trained):
    name, run = trained
    before = json.loads((run / "evaluation.json").read_text())

    command("evaluate", run)

    assert json.loads((run / "evaluation.json").read_text()) == before
    assert before["scores"]["frechet_distance"]["value"] > 0
    expected = {"points": {"precision", "recall"}, "digits": {"class_agreement"}}[name]
    assert expected <= set(before["scores"])
    assert "failed" not in before


def test_the_run_is_diagnosed(trained):
    _, run = trained
    command("diagnose", run, "--which", "{type: denoising_error, num: 20, num_timesteps: 2}")

    found = json.loads((run / "diagnostics.json").read_text())
    assert found["denoising_error"]["value"] > 0


def test_the_export_is_weights_recipe_and_a_program(trained):
    _, run = trained
    folder = run / "pipeline"

    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "recipe.yaml",
        "load.py",
    }
    assert (folder / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    with safe_open(folder / "model.safetensors", "pt") as opened:
        header = opened.metadata()
        names = set(opened.keys())
    assert (header["step"], header["format"]) == ("4", "pt")
    assert names == {name.removeprefix("model.") for name in saved(run)["ema"]}


def test_the_program_loads_the_network_and_gives_the_same_outputs(trained, monkeypatch):
    _, run = trained
    opened = TrainedRun(run)
    expected, weights = opened.denoiser(4, True, CPU)
    monkeypatch.chdir(run / "pipeline")

    loaded = runpy.run_path("load.py")["net"]

    labels = opened.model.conditioning.labels_of([0, 1, 2])
    x, t = torch.randn(3, *opened.model.shape), torch.tensor([0, 500, 999])
    cond = opened.model.conditioning(labels)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, dict(cond)), expected(x, t, cond))
    assert weights == "ema"
    assert not loaded.training


@pytest.mark.distributed
def test_the_program_loads_the_network_by_itself(trained):
    """In a process that knows the run's own module from its folder alone."""
    _, run = trained
    program = "import runpy; net = runpy.run_path('load.py')['net']; print(type(net).__name__)"
    folders = [str(ROOT), str(run / "imports")]
    code = f"import os, sys; os.chdir({str(run / 'pipeline')!r}); {program}"

    process = launched(["-c", code], PYTHONPATH=":".join(folders))
    out, err = output_of(process)

    assert process.returncode == 0, err
    assert out.strip() in ("PointMLP", "SmallImageNetwork")


def test_an_own_image_network_takes_classes_and_guidance(trained, tmp_path):
    name, run = trained
    if name == "points":
        pytest.skip("points have no classes")

    def image(folder: str, *arguments: str) -> bytes:
        command("sample", run, "--num", 1, "--out", tmp_path / folder, *arguments)
        return (tmp_path / folder / "000000.png").read_bytes()

    first = image("first")
    assert image("again") == first
    assert image("label", "--label", "7") != first
    assert image("guidance", "sampling.guidance=3") != first


def test_the_run_keeps_a_copy_of_the_module(trained):
    name, run = trained
    module = {"points": "own_points.py", "digits": "own_image_network.py"}[name]

    assert (run / "imports" / module).read_text() == (OWN / module).read_text()
    assert module.removesuffix(".py") in sys.modules
