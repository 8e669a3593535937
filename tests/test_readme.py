"""What the README shows is run."""

import re
import sys
from pathlib import Path

import pytest
import torch

from difftrain import recipe
from difftrain.registry import WEIGHTINGS

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


def test_the_loop_of_ones_own_trains():
    scope: dict = {}
    exec(block_with("python", "losses.total.backward()"), scope)

    assert torch.isfinite(scope["losses"].total)
    assert scope["step"] == 9


def test_the_method_in_one_file_is_a_recipe_block(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(block_with("python", "InverseSNR"))
    data = {
        "output": str(tmp_path / "run"), "model": {"type": "unet2d", "preset": "digits"}, "schedule": "linear",
        "parameterization": "v_prediction", "data": "digits", "transform": {"resolution": 8, "channels": 1},
        "training": {"steps": 1, "batch_size": 4}, "sampling": {"sampler": "ddim"},
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
