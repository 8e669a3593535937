"""Images of several aspect ratios through whole runs, with and without a cache."""

import json
import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers.fine_tuning import recipe

from difftrain.run.session import train

pytestmark = pytest.mark.usefixtures("without_report")


def photos(folder: Path) -> Path:
    """Write captioned images, most of which are no squares."""
    folder.mkdir()
    for i, (width, height) in enumerate([(40, 40)] * 5 + [(60, 30)] * 6 + [(30, 60)] * 3):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}")
    return folder


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "flux"])
def test_a_cached_run_with_buckets_trains_what_an_uncached_one_does(
    pipelines, tmp_path, caplog, family
):
    caplog.set_level(logging.INFO, "difftrain")
    photos(tmp_path / "photos")
    losses = {}
    for name, cache in (("cached", {"folder": str(tmp_path / "cache")}), ("plain", None)):
        file = recipe(
            tmp_path,
            family,
            pipelines(family),
            cache=cache,
            buckets={"step": 4, "max_ratio": 2.0},
            transform={"resolution": 24},
            output=str(tmp_path / name),
            training={"steps": 6, "batch_size": 4, "log_every": 1, "num_sampled": 2},
        )
        assert train(str(file)) == 0
        losses[name] = [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]

    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-5)
    table = [line.split() for line in caplog.text.splitlines() if " x " in line][1:4]
    assert [(row[0], row[2], row[3]) for row in table] == [
        ("32", "16", "3"),
        ("24", "24", "5"),
        ("16", "32", "6"),
    ]
