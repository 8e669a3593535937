"""What a run builds from a tiny recipe before its weights, and data for it."""

import io
from pathlib import Path
from typing import Any

import PIL.Image

from difftrain.recipe.reading import load
from difftrain.run.session import Plans
from difftrain.run.training import Launch
from helpers.runs import tiny

SCORED: dict[str, Any] = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
}  # an evaluation block


def plans(folder: Path, *overrides: str, **changes: Any) -> Plans:
    """Return what a training run builds from the tiny recipe.

    Args:
        folder: Where the recipe goes.
        overrides: Dotted changes, as on the command line.
        changes: Changes of blocks, as for `tiny`.
    """
    return Plans(load(tiny(folder, **changes), overrides), Launch())


def parquet(file: Path, num: int = 6) -> Path:
    """Write images with the integer labels 0, 1, 2 in turn.

    Args:
        file: The parquet file.
        num: Number of images.
    """
    import datasets

    rows = []
    for i in range(num):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (i, 0, 0)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 3})
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def rows_of(file: Path, **more: Any) -> dict[str, Any]:
    """Return the data block of a parquet file."""
    return {"type": "huggingface", "path": "parquet", "data_files": str(file), **more}
