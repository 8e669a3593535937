"""What the README shows is run, parsed or looked up."""

import re
import runpy
import shlex
import sys
from typing import Any

import pytest
import torch
import typer
from helpers.commands import app, command
from helpers.images import random_images, written
from helpers.places import ROOT
from helpers.runs import assert_identical, launched, output_of, saved, tiny

from difftrain.core.rng import Rng
from difftrain.evaluation import service
from difftrain.evaluation.features.raw import Pixels
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import SCHEDULES, NoiseSchedule
from difftrain.objective.slots import WEIGHTINGS
from difftrain.objective.types import Batch
from difftrain.recipe.reading import parse
from difftrain.recipe.yaml_text import read_yaml

README = ROOT / "README.md"
SHOWN = {"python": 7, "yaml": 4}  # blocks of each language; a new one wants a test here


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


@pytest.mark.parametrize("language", SHOWN)
def test_every_block_has_its_test(language):
    assert len(blocks(language)) == SHOWN[language]


# Python


def test_an_own_loop_trains_like_the_stock_one():
    scope: dict[str, Any] = {}
    exec(block_with("python", "F.mse_loss"), scope)
    before = [p.detach().clone() for p in scope["unet"].parameters()]
    exec(block_with("python", "losses.total.backward()"), scope)

    assert torch.isfinite(scope["loss"])
    assert torch.isfinite(scope["losses"].total)
    assert list(scope["losses"].terms) == ["error", "step_variation"]
    assert scope["step"] == 9
    pairs = zip(scope["unet"].parameters(), before, strict=True)
    assert any(not torch.equal(p, old) for p, old in pairs)


def test_the_plain_objective_is_the_stock_loss_on_the_same_draws():
    scope: dict[str, Any] = {}
    exec(block_with("python", "F.mse_loss"), scope)
    unet, scheduler = scope["unet"], scope["scheduler"]
    x0, rng = scope["images"][0], Rng(0, 3, range(16))
    objective = Objective(NoiseSchedule.from_diffusers(scheduler), "epsilon")

    ours = objective(lambda x_t, t, cond: unet(x_t, t).sample, Batch(x0), rng).total

    eps, t = objective.noise(x0, rng), objective.timesteps(1000, rng).t
    stock = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, eps, t), t).sample, eps)
    # diffusers' float32 tables are off by 2e-4 at t = 0.
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=0)


def test_the_lines_that_load_a_class_conditional_unet_load_it(tmp_path, monkeypatch):
    command("train", tiny(tmp_path, output=str(tmp_path / "runs/digits"), training__steps=1))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}

    exec(block_with("python", "DPMSolverMultistepScheduler"), scope)

    assert scope["unet"].config.num_class_embeds == 11
    assert scope["scheduler"].config.num_train_timesteps == 50


def test_a_loop_of_ones_own_is_scored(tmp_path, monkeypatch, capsys):
    """With pixels in place of the Inception, whose weights are not there."""
    images = random_images(20, 1, (3, 8, 8))
    written(images, tmp_path / "samples")
    written(random_images(30, 2, (3, 8, 8)), tmp_path / "held_out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(service, "Inception", lambda *given, **more: Pixels((3, 8, 8)))
    text = block_with("python", "from difftrain.evaluation import fid, score")
    text = text.replace('"inception", ["fid", "kid"]', '"pixels", ["frechet_distance"]')
    text = text.replace("50_000", "20").replace('["fid"]', '["frechet_distance"]')

    exec(text, {"generate": lambda indices: images[indices]})

    score, distance = map(float, capsys.readouterr().out.split())
    assert score == pytest.approx(distance)


@pytest.fixture
def own_program(tmp_path, monkeypatch):
    """Write the program that trains points, and go to its folder."""
    text = block_with("python", "trainer.train()")
    assert text.startswith("# train_points.py\n")
    file = tmp_path / "train_points.py"
    file.write_text(text.replace("steps=200", "steps=6").replace("every=100", "every=3"))
    monkeypatch.chdir(tmp_path)
    return file


def test_the_program_trains_without_a_recipe_and_resumes(own_program):
    run = own_program.parent / "runs" / "points_from_python"
    first = runpy.run_path(str(own_program), run_name="__main__")
    assert first["trainer"].progress.step == 6
    before = saved(run)

    again = runpy.run_path(str(own_program), run_name="__main__")

    assert again["trainer"].progress.step == 6
    assert again["trainer"].seconds["training"] == 0
    assert_identical(saved(run), before)


@pytest.mark.distributed
def test_the_program_trains_the_same_on_two_processes(own_program):
    runpy.run_path(str(own_program), run_name="__main__")
    run = own_program.parent / "runs" / "points_from_python"
    one = saved(run.rename(run.with_name("one")))["model"]

    process = launched([str(own_program)], processes=2, PYTHONPATH=str(ROOT))
    _, err = output_of(process)

    assert process.returncode == 0, err
    two = saved(run)["model"]
    for name, value in one.items():  # sums of float32 in a different order
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_scores_of_an_own_loop_are_numbers():
    scope: dict[str, Any] = {}
    exec(block_with("python", "FeatureStatistics"), scope)

    assert scope["mean"].shape == (64,)
    assert scope["cov"].shape == (64, 64)
    assert scope["distance"] > 0


# Recipes


def minimal(folder) -> dict[str, Any]:
    """Return a recipe to put a block of the README into."""
    return {
        "output": str(folder / "run"),
        "model": {"type": "unet2d", "preset": "digits"},
        "schedule": "linear",
        "parameterization": "v_prediction",
        "data": "digits",
        "transform": {"resolution": 8, "channels": 1},
        "training": {"steps": 1, "batch_size": 4},
        "sampling": {"sampler": "ddim"},
    }


def test_the_method_in_one_file_is_a_recipe_block(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(block_with("python", "InverseSNR"))
    data = {**minimal(tmp_path), **read_yaml(block_with("yaml", "imports:"), "README.md")}
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        part = parse(data, folder=tmp_path).objective.arguments["weighting"]
        level = SCHEDULES.parse("linear", "").build().level(torch.tensor([0, 999]))
        torch.testing.assert_close(part.build()(level), 2 / (1 + level.snr))
        with pytest.raises(ValueError, match="greater than 0"):
            part.slot.constructors["inverse_snr"](c=0)
    finally:
        WEIGHTINGS.constructors.pop("inverse_snr", None)


@pytest.mark.parametrize(
    "number", [n for n, block in enumerate(blocks("yaml")) if "imports:" not in block]
)
def test_every_block_of_a_recipe_is_valid(tmp_path, number):
    data = read_yaml(blocks("yaml")[number], "README.md")
    whole = data if "model" in data else {**minimal(tmp_path), **data}

    parse(whole)


# Commands


def command_lines() -> list[str]:
    """Return the lines of the README that call difftrain, without their comments."""
    text = "".join(blocks(""))
    lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("difftrain ")]


def test_every_command_line_is_one_of_the_application():
    known = typer.main.get_command(app)
    lines = command_lines()
    for line in lines:
        _, name, *arguments = shlex.split(line)
        with known.commands[name].make_context(name, arguments) as context:
            assert context.params, line

    assert len(lines) > 8


def test_the_recipes_and_scripts_that_it_names_exist():
    named = set(re.findall(r"(?:recipes|scripts|docs|difftrain)/[\w/]+\.\w+", README.read_text()))

    missing = [name for name in sorted(named) if not (README.parent / name).exists()]
    assert not missing
    assert len(named) > 8
