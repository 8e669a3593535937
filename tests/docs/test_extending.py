"""The parts of docs/extending.md: each block runs, and recipes with all of them train."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import command, pictures
from helpers.places import ROOT
from helpers.runs import lines, tiny

from difftrain.recipe.catalogue import SLOTS
from difftrain.recipe.yaml_text import read_yaml

PAGE = ROOT / "docs" / "extending.md"
MODULE = "parts_of_the_page"  # holds all blocks of the page: their names are registered once


def section(title: str) -> str:
    """Return the text of a section of the page."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def block(title: str, language: str) -> str:
    """Return the one block of a language in a section."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", section(title), re.DOTALL | re.MULTILINE)
    return found


TITLES = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
PARTS = [title for title in TITLES if "```python" in section(title)]


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Any:
    """Import all Python blocks of the page as one module, beside which recipes find it."""
    folder = tmp_path_factory.mktemp("module")
    texts = [block(title, "python") for title in PARTS]
    (folder / f"{MODULE}.py").write_text("\n".join(texts))
    sys.path.insert(0, str(folder))
    __import__(MODULE)
    yield sys.modules[MODULE]
    del sys.modules[MODULE]
    sys.path.remove(str(folder))
    for slot in SLOTS:  # what the page registers is for its own tests alone
        for name, constructor in list(slot.constructors.items()):
            if constructor.__module__ == MODULE:
                del slot.constructors[name]


def test_every_part_of_the_table_has_its_section_and_the_other_way_around():
    linked = re.findall(r"\| \[([^\]]+)\]\(#[\w-]+\)", PAGE.read_text())

    assert [name.capitalize() for name in linked] == PARTS
    assert len(PARTS) == 8


def test_every_registry_of_the_table_exists(module):
    import importlib

    for dotted in re.findall(r"\| `(difftrain\.[\w.]+)` \|", PAGE.read_text()):
        home, _, name = dotted.rpartition(".")
        assert getattr(importlib.import_module(home), name).slot


def of_tensors(folder: Path, **more: Any) -> Path:
    """Write a recipe of the page's network and data set."""
    blocks = {
        **read_yaml(block("Network", "yaml"), "network"),
        **read_yaml(block("Data set", "yaml"), "data"),
        "transform": None,
        "label_dropout": 0.0,
        "imports": [MODULE],
        "training": {"steps": 4, "batch_size": 16, "log_every": 2, "num_sampled": 20},
    }
    return tiny(folder, **blocks, **more)


@pytest.mark.usefixtures("without_report")
def test_network_data_set_weighting_sampler_metric_and_callback_in_one_run(module, tmp_path):
    norms = tmp_path / "norms.jsonl"
    callback = read_yaml(block("Callback", "yaml"), "callback")["callbacks"][0]
    evaluation = read_yaml(block("Metric", "yaml"), "metric")["evaluation"]
    file = of_tensors(
        tmp_path,
        objective=read_yaml(block("Weighting", "yaml"), "weighting")["objective"],
        sampling=read_yaml(block("Sampler", "yaml"), "sampler")["sampling"],
        evaluation={**evaluation, "num_samples": 40},
        callbacks=[{**callback, "every": 2, "file": str(norms)}],
    )

    command("train", file)
    command("sample", tmp_path / "run", "--num", 30, "--out", tmp_path / "samples")

    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]
    assert scores["mean_gap"]["value"] > 0
    assert scores["mean_gap"]["better"] == "lower"
    assert [line["step"] for line in lines(norms)] == [2, 4]
    assert np.load(tmp_path / "samples" / "samples.npy").shape == (30, 2)
    assert (tmp_path / "samples" / "scatter.png").exists()
    level = module.NoiseLevel(torch.tensor([0.6]).double(), torch.tensor([0.8]).double())
    assert 0 < module.NoiseBand()(level) <= 1


@pytest.mark.usefixtures("without_report")
def test_the_regularizer_is_a_term_of_the_log(module, tmp_path):
    objective = read_yaml(block("Regularizer", "yaml"), "regularizer")["objective"]
    command("train", tiny(tmp_path, imports=[MODULE], objective=objective, training__steps=4))

    log = lines(tmp_path / "run" / "log.jsonl")
    assert all(line["terms"]["mean_shift"] > 0 for line in log[::2])
    assert "mean_shift.largest" in log[0]["measures"]


@pytest.mark.usefixtures("without_report")
def test_the_features_score_images(module, tmp_path):
    held_out = pictures(tmp_path / "held_out", num=12)
    data = read_yaml(block("Feature extractor", "yaml"), "features")
    assert data.pop("imports") == ["my_features"]
    evaluation = data["evaluation"]
    features = {**evaluation["features"], "path": f"{MODULE}:colour_moments"}
    images = {**evaluation["reference"], "path": str(held_out)}
    config = {"in_channels": 3, "out_channels": 3, "num_class_embeds": None}
    changes = {f"model__config__{key}": value for key, value in config.items()}
    file = tiny(
        tmp_path,
        **changes,
        imports=[MODULE],
        label_dropout=0.0,
        data={**images, "path": str(pictures(tmp_path / "photos"))},
        transform={"resolution": 8},
        training__steps=1,
        evaluation={**evaluation, "features": features, "reference": images, "num_samples": 10},
    )

    command("train", file)

    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]
    assert scores["frechet_distance"]["value"] > 0
    assert module.colour_moments(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 6)


def test_methods_lists_the_parts_of_the_page(module):
    shown = command("methods", "--import", MODULE).out

    for name in ("points_mlp", "circle", "noise_band", "mean_shift", "deis", "mean_gap"):
        assert f"  {name} " in shown
    assert "w = exp(-(log SNR - center)^2 / (2 width^2))" in shown
    assert "arXiv:2204.13902" in shown
    assert "  weight_norm " in shown
