"""What the README shows is run."""

import re
import sys

import pytest
import torch
from helpers.places import ROOT

from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import WEIGHTINGS
from difftrain.objective.types import Batch
from difftrain.recipe.schema import schema as recipe

README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


def test_the_loop_of_ones_own_trains_next_to_the_stock_one():
    scope: dict = {}
    exec(block_with("python", "F.mse_loss"), scope)
    before = [p.detach().clone() for p in scope["unet"].parameters()]
    exec(block_with("python", "losses.total.backward()"), scope)

    assert torch.isfinite(scope["loss"])
    assert torch.isfinite(scope["losses"].total)
    assert list(scope["losses"].terms) == ["error", "step_variation"]
    assert scope["step"] == 9
    assert any(
        not torch.equal(p, old) for p, old in zip(scope["unet"].parameters(), before, strict=True)
    )


def test_the_plain_objective_is_the_stock_loss_on_the_same_draws():
    scope: dict = {}
    exec(block_with("python", "F.mse_loss"), scope)
    unet, scheduler, x0, rng = (
        scope["unet"],
        scope["scheduler"],
        scope["images"][0],
        Rng(0, 3, range(16)),
    )
    objective = Objective(NoiseSchedule.from_diffusers(scheduler), "epsilon")

    ours = objective(lambda x_t, t, cond: unet(x_t, t).sample, Batch(x0), rng).total

    eps, t = objective.noise(x0, rng), objective.timesteps(1000, rng).t
    stock = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, eps, t), t).sample, eps)
    torch.testing.assert_close(
        ours, stock, rtol=1e-4, atol=0
    )  # diffusers' float32 tables are off by 2e-4 at t = 0


def test_the_method_in_one_file_is_a_recipe_block(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(block_with("python", "InverseSNR"))
    data = {
        "output": str(tmp_path / "run"),
        "model": {"type": "unet2d", "preset": "digits"},
        "schedule": "linear",
        "parameterization": "v_prediction",
        "data": "digits",
        "transform": {"resolution": 8, "channels": 1},
        "training": {"steps": 1, "batch_size": 4},
        "sampling": {"sampler": "ddim"},
        **recipe.read_yaml(block_with("yaml", "imports:"), "README.md"),
    }
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        part = recipe.parse(data, folder=tmp_path).objective.arguments["weighting"]
        level = recipe.SCHEDULES.parse("linear", "").build().level(torch.tensor([0, 999]))
        torch.testing.assert_close(part.build()(level), 2 / (1 + level.snr))
        with pytest.raises(ValueError, match="greater than 0"):
            part.slot.constructors["inverse_snr"](c=0)
    finally:
        WEIGHTINGS.constructors.pop("inverse_snr", None)


def test_the_recipes_and_scripts_that_it_names_exist():
    named = set(re.findall(r"(?:recipes|scripts|docs|difftrain)/[\w/]+\.\w+", README.read_text()))

    missing = [name for name in sorted(named) if not (README.parent / name).exists()]
    assert not missing
    assert len(named) > 8
