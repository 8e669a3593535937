"""One recipe that uses own parts for everything that a user can bring, all in one module."""

import json
from pathlib import Path

import diffusers
import pytest
from helpers.commands import command, refused
from helpers.fine_tuning import pixels
from helpers.runs import assert_identical, lines, saved, tiny

from difftrain.run.session import train
from difftrain.training.checkpoint import step_of, whole

STRIPES = {"type": "own_stripes", "num": 9}
RECIPE = {
    "imports": ["helpers.own_parts"],
    "data": STRIPES,
    "model__config__num_class_embeds": 4,
    "sampling": {"sampler": {"type": "own_straight", "steps": 3}, "block_size": 4},
    "evaluation": {
        "features": {"type": "own_rows_and_columns", "scale": 2.0},
        "reference": {**STRIPES, "seed": 1},
        "metrics": ["own_spread", "frechet_distance"],
        "num_samples": 6,
    },
    "callbacks": [{"type": "own_norm", "every": 2}],
    "training": {"steps": 4, "batch_size": 6, "log_every": 1, "num_sampled": 6},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with all own parts."""
    folder = tmp_path_factory.mktemp("own")
    command("train", tiny(folder, **RECIPE))
    return folder / "run"


def test_the_own_data_are_trained_on(run):
    facts = json.loads((run / "facts.json").read_text())["data"]

    assert facts["class_names"] == ["one", "two", "four"]
    assert facts["is_labelled"]
    assert [line["step"] for line in lines(run / "log.jsonl")] == [1, 2, 3, 4]


def test_the_own_callback_was_called_and_picked_the_best_step(run):
    norms = lines(run / "norms.jsonl")

    assert [line["step"] for line in norms] == [2, 4]
    smallest = min(norms, key=lambda line: line["norm"])
    assert saved(run, 4)["trainer"]["best_step"] == smallest["step"]
    assert smallest["step"] in [step_of(path) for path in whole(run / "checkpoints")]


def test_the_own_score_on_the_own_features_is_kept_with_its_direction_and_title(run):
    found = json.loads((run / "evaluation.json").read_text())
    score = found["scores"]["own_spread"]

    assert score["value"] > 0
    assert (score["better"], score["title"]) == ("near 1", "Spread of the features")
    assert found["protocol"]["features"] == {"type": "own_rows_and_columns", "scale": 2.0}
    assert "Spread of the features" in (run / "report.html").read_text()


def test_the_own_sampler_draws(run, tmp_path):
    command("sample", run, "--num", 3, "--out", tmp_path / "three")
    command("sample", run, "--num", 3, "--out", tmp_path / "more", "sampling.sampler.steps=6")

    three, more = (pixels(tmp_path / name / "000000.png") for name in ("three", "more"))
    assert three.shape == (8, 8)
    assert (three != more).any()


def test_the_run_is_scored_again_with_its_own_parts(run):
    before = json.loads((run / "evaluation.json").read_text())

    command("evaluate", run)

    assert json.loads((run / "evaluation.json").read_text()) == before


def test_an_own_scheduler_is_exported_as_one_that_other_programs_have(run):
    scheduler = diffusers.DDIMScheduler.from_pretrained(run / "pipeline" / "scheduler")
    stored = json.loads((run / "pipeline" / "scheduler" / "scheduler_config.json").read_text())

    assert stored["_class_name"] == "DDIMScheduler"
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.num_train_timesteps == 50


@pytest.mark.usefixtures("without_report")
def test_a_run_of_own_parts_resumes_bit_for_bit(run, tmp_path):
    file = str(tiny(tmp_path, **RECIPE))
    assert train(file, ["training.steps=2"]) == 0
    assert train(file) == 0

    assert_identical(saved(tmp_path / "run", 4)["model"], saved(run, 4)["model"])


def test_arguments_of_own_parts_are_checked_like_all_others(tmp_path):
    file = tiny(tmp_path, **RECIPE)

    message = refused("train", file, "callbacks=[{type: own_norm, evry: 2}]", "data.num=0")

    assert "callbacks.0.evry: unknown key (did you mean 'every'?)" in message
    assert "data.num: expected greater than or equal to 1, got 0" in message
    assert not (tmp_path / "run").exists()


def test_without_its_module_a_part_is_unknown_by_its_name(tmp_path):
    """The name is that of no part here, so that a module which is loaded already does not help."""
    file = tiny(tmp_path, **RECIPE)

    message = refused("check", file, "imports=[]", "data.type=own_stripe")

    assert "data.type: unknown data 'own_stripe' (did you mean 'own_stripes'?)" in message
