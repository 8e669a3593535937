"""Tiny fine-tuning runs: a recipe for a text-to-image pipeline, captioned photos, pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml

PROMPT = "a photo of a cat"
FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]


def photos(folder: Path, num: int = 8, size: tuple[int, int] = (24, 20)) -> Path:
    """Write captioned images of noise into a new folder.

    Args:
        folder: The folder.
        num: Number of images.
        size: (height, width) of each.
    """
    folder.mkdir(parents=True)
    for i in range(num):
        noise = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of thing {i}")
    return folder


def recipe(folder: Path, family: str, base: Path, **changes: Any) -> Path:
    """Write a recipe file that fine-tunes a pipeline, whose run goes to folder/run.

    Args:
        folder: Where the file goes.
        family: The registered name of the pipeline.
        base: The pipeline's folder.
        changes: Whole blocks; None removes one.
    """
    data = folder / "photos"
    if not data.exists():
        photos(data)
    sampler: dict[str, Any] = {"type": "ddim", "steps": 2, "spacing": "leading"}
    if family in ("stable_diffusion_3", "flux"):
        sampler = {"type": "flow_euler", "steps": 2}
    blocks: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"type": family, "path": str(base)},
        "adapter": {"type": "lora", "rank": 2},
        "data": {"type": "image_folder", "path": str(data), "captions": "sidecar"},
        "transform": {"resolution": 16},
        "captions": {"dropout": 0.2},
        "training": {"steps": 2, "batch_size": 4, "log_every": 1, "num_sampled": 2},
        "optimizer": {"lr": 1e-2},
        "sampling": {
            "sampler": sampler,
            "guidance": 1.0 if family == "flux" else 3.0,
            "prompts": [PROMPT, "a dog"],
        },
    }
    blocks |= changes
    written = {key: value for key, value in blocks.items() if value is not None}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(written))
    return file


def pixels(file: Path) -> np.ndarray:
    """Read a picture as integers, so that differences do not wrap around."""
    return np.asarray(PIL.Image.open(file)).astype(int)
