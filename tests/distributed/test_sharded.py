"""FSDP 2 on two gloo processes: sharded weights train, average and resume as whole ones do."""

import json

import pytest
from helpers.places import PROGRAMS
from helpers.runs import (
    assert_identical,
    largest_difference,
    lines,
    saved,
    tiny,
    trained,
)
from helpers.several import run_program

from difftrain.recipe.reading import load
from difftrain.run.session import Plans
from difftrain.run.training import Launch
from difftrain.training.checkpoint import load_weights

pytestmark = pytest.mark.distributed


def recipe(folder):
    training = {
        "steps": 6,
        "batch_size": 16,
        "micro_batch_size": 4,
        "log_every": 2,
        "num_sampled": 4,
        "sample_every": 3,
    }
    return tiny(
        folder,
        training=training,
        ema={"type": "decay", "decay": 0.9},
        model__dtype="float64",
        optimizer={
            "name": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.1,
            "decay_norms_and_biases": False,
        },
    )


def regularized(folder):
    """Three steps with further passes through the sharded weights: ahead, back, and rolled down."""
    regularizers = [
        {"type": "step_variation", "central": True, "step_size": 0.1},
        {"type": "error_propagation", "gather": True, "checkpointing": True},
    ]
    file = tiny(
        folder / "regularized",
        training={"steps": 3, "batch_size": 16, "log_every": 1},
        model__dtype="float64",
        objective={"regularizers": regularizers},
    )
    return file.rename(folder / "regularized.yaml")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    recipe(folder)
    regularized(folder)
    run_program(PROGRAMS / "sharded.py", folder, num=2)
    return folder


def test_the_parameters_were_sharded_and_every_run_came_to_its_end(sharded):
    for rank in (0, 1):
        found = json.loads((sharded / f"codes-{rank}.json").read_text())
        assert found["codes"] == [0, 0, 0, 0]
        assert all(count > 50 for count in found["sharded"])


def test_sharded_weights_train_as_whole_ones_also_after_samples_were_made_with_their_average(
    sharded, tmp_path
):
    """Samples of the average do not change the weights that train on.

    After step 3 a root module stays gathered, when a forward had no backward.
    """
    trained(recipe(tmp_path), "training.micro_batch_size=16")

    for name in ("model", "ema"):
        assert (
            largest_difference(saved(sharded / "straight")[name], saved(tmp_path / "run")[name])
            <= 1e-12
        )
    name = "samples/step-0000003.png"
    assert (sharded / "straight" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_sharded_weights_train_as_whole_ones_with_regularizers(sharded, tmp_path):
    trained(regularized(tmp_path), f"output={tmp_path / 'run'}")

    assert (
        largest_difference(
            saved(sharded / "regularized")["model"], saved(tmp_path / "run")["model"]
        )
        <= 1e-12
    )
    assert lines(sharded / "regularized/log.jsonl")[-1]["terms"].keys() == {
        "error",
        "step_variation",
        "error_propagation",
    }


def test_a_sharded_run_resumes_as_if_it_had_never_stopped(sharded):
    straight, parts = saved(sharded / "straight"), saved(sharded / "parts")

    assert_identical(parts["model"], straight["model"])
    assert_identical(parts["ema"], straight["ema"])
    assert_identical(parts["state"]["optimizer"]["state"], straight["state"]["optimizer"]["state"])
    assert_identical(
        lines(sharded / "parts/log.jsonl")[-1]["grad_norm"],
        lines(sharded / "straight/log.jsonl")[-1]["grad_norm"],
    )


def test_a_sharded_run_is_sampled_and_exported_and_its_checkpoint_loads_whole(sharded):
    run = sharded / "straight"

    assert (run / "samples/step-0000003.png").exists()
    assert (run / "samples/final.png").exists()
    assert (
        load_weights(
            Plans(load(run / "recipe.yaml"), Launch()).model.denoiser(),
            run / "checkpoints/step-0000006",
            averaged=True,
        )
        == "ema"
    )
