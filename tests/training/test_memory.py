"""A LoRA's step saves no more for its backward than the benchmark's loop of diffusers and peft."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from helpers.fine_tuning import recipe
from helpers.places import ROOT
from helpers.runs import trainer

BENCH = runpy.run_path(str(ROOT / "scripts" / "bench" / "fine_tuning.py"))
FAMILIES = ["stable_diffusion", "stable_diffusion_xl"]


def kept(folder: Path, family: str, base: Path, **changes: Any) -> int:
    """Return the bytes that the library's step saves for its backward."""
    blocks = {
        "adapter": {"type": "lora", "rank": BENCH["RANK"]},
        "cache": {"folder": str(folder / "cache")},
        "training": {"steps": 2, "batch_size": BENCH["BATCH"]},
    }
    made = trainer(recipe(folder, family, base, **{**blocks, **changes}))
    batches = made.loader.batches(0)
    return BENCH["saved_bytes"](made.bare, lambda: made.step(batches))


def kept_by_bare_loop(base: Path, **options: Any) -> int:
    bare = BENCH["BareLoop"](base, **options)
    return BENCH["saved_bytes"](bare.model, bare.step)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_step_keeps_what_the_bare_loop_keeps(pipelines, tmp_path, family):
    base = pipelines(family)

    assert kept(tmp_path, family, base) == pytest.approx(kept_by_bare_loop(base), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_half_at_most(pipelines, tmp_path, family):
    base = pipelines(family)
    model = {"type": family, "path": str(base), "gradient_checkpointing": True}

    assert 0 < kept(tmp_path, family, base, model=model) <= kept_by_bare_loop(base) / 2


def test_a_step_variation_keeps_a_second_pass_and_no_third(pipelines, tmp_path):
    """The finite difference has the graphs of x0_hat and of x0_hat ahead, but none of the slope."""
    base = pipelines("stable_diffusion")
    smooth = {"regularizers": [{"type": "step_variation", "step_size": 0.1}]}

    ratio = kept(tmp_path, "stable_diffusion", base, objective=smooth) / kept_by_bare_loop(base)

    assert 1.5 < ratio < 2.2
