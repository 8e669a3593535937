"""What may change in a recipe when its run resumes, and what the log says about it."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import own_callback
from helpers.commands import command, refused
from helpers.runs import lines, saved, tiny

from difftrain.core.errors import InputError
from difftrain.recipe.reading import load
from difftrain.run.facts import DataFacts
from difftrain.run.finished import Finished
from difftrain.run.folder import prepare
from difftrain.training.checkpoint import step_of, whole

HELD_OUT = {"type": "digits", "part": "held_out"}
SCORED: dict[str, Any] = {
    "features": "pixels",
    "reference": HELD_OUT,
    "metrics": ["frechet_distance"],
    "num_samples": 6,
}
LOOP: dict[str, Any] = {
    "every": 1,
    "num_samples": 6,
    "reference": {"type": "digits", "part": "classifier"},
    "metrics": ["frechet_distance"],
    "select": "frechet_distance",
}
BLOCKS: dict[str, Any] = {
    "imports": ["helpers.own_callback"],
    "evaluation": SCORED,
    "validation": {"data": HELD_OUT, "every": 2, "num": 8, "num_timesteps": 2},
}


def begun(folder: Path, **changes: Any) -> Path:
    """Return the recipe file of a run that has begun in folder/run."""
    file = tiny(folder, **BLOCKS, **changes)
    recipe = load(file)
    run = prepare(recipe, fresh=False, accept_changes=False).folder
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    DataFacts().write(run)
    return file


def changes_of(file: Path, *overrides: str, accept: bool = False) -> dict[str, list[Any]]:
    """Return what a resume with these overrides changes."""
    return prepare(load(file, overrides), fresh=False, accept_changes=accept).changes


def test_where_features_are_kept_decides_no_score(tmp_path):
    file = begun(tmp_path)
    settings = [
        Finished(tmp_path / "run", load(file, overrides)).score_settings(1)
        for overrides in ([], [f"evaluation.store={tmp_path}"], ["evaluation.num_samples=7"])
    ]

    assert settings[0] == settings[1] != settings[2]


BESIDE_TRAINING = [
    ("evaluation.num_samples=7", {"evaluation.num_samples": [6, 7]}),
    ("evaluation.metrics=[precision_recall]", {"evaluation.metrics": None}),
    ("evaluation=null", None),
    ("sampling.guidance=2", {"sampling.guidance": [1.0, 2.0]}),
    ("sampling.sampler.steps=3", {"sampling.sampler.steps": [2, 3]}),
    ("validation.every=1", {"validation.every": [2, 1]}),
    ("validation=null", None),
    ("training.trackers=[tensorboard]", {"training.trackers": [[], ["tensorboard"]]}),
    ("training.log_every=2", {"training.log_every": [1, 2]}),
    ("training.checkpoint_every=3", {"training.checkpoint_every": [100, 3]}),
    ("training.sample_every=2", {"training.sample_every": [None, 2]}),
    ("training.keep_checkpoints=1", {"training.keep_checkpoints": [2, 1]}),
    ("training.num_sampled=5", {"training.num_sampled": [2, 5]}),
    ("training.steps=9", {"training.steps": [6, 9]}),
    ("loader.num_workers=2", {"loader.num_workers": [0, 2]}),
    ("license=CC0-1.0", {"license": [None, "CC0-1.0"]}),
    ("callbacks=[{type: own_callback, every: 1}]", {"callbacks": None}),
]


@pytest.mark.parametrize(("override", "expected"), BESIDE_TRAINING)
def test_what_does_not_train_may_change(tmp_path, override, expected):
    """None stands for what is not compared here."""
    found = changes_of(begun(tmp_path), override)

    assert found
    if expected is not None:
        assert list(found) == list(expected)
        for key, pair in expected.items():
            assert pair in (None, found[key])
    json.dumps(found)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("optimizer.lr=0.5", "-  lr: 0.001\n+  lr: 0.5"),
        ("optimizer.name=sgd", "-  name: adamw\n+  name: sgd"),
        ("seed=1", "-seed: 0\n+seed: 1"),
        ("training.batch_size=4", "-  batch_size: 8\n+  batch_size: 4"),
        ("training.micro_batch_size=4", "+  micro_batch_size: 4"),
        ("training.clip_norm=2", "+  clip_norm: 2.0"),
        ("training.steps=5", "-  steps: 6\n+  steps: 5"),
        ("label_dropout=0.1", "+label_dropout: 0.1"),
        ("objective.weighting=p2", "+    type: p2"),
        ("ema={type: decay}", "+  type: decay"),
        ("lr_schedule={type: cosine}", "+  type: cosine"),
        ("data.part=all", "-  part: train\n+  part: all"),
        ("transform.flip=true", "+  flip: true"),
        ("model.config.block_out_channels=[8, 8]", "-    - 16\n+    - 8"),
        ("parameterization=sample", "+parameterization: sample"),
        ("loader.on_error=skip", "+  on_error: skip"),
    ],
)
def test_what_trains_is_refused_with_the_difference(tmp_path, override, shown):
    file = begun(tmp_path)

    with pytest.raises(InputError) as error:
        changes_of(file, override, "evaluation.num_samples=7")

    assert shown in str(error.value)
    assert "num_samples" not in str(error.value)
    assert "--accept-changes" in str(error.value)
    assert len(changes_of(file, override, accept=True)) >= 1


def test_samples_of_the_prior_are_trained_on(tmp_path):
    file = begun(tmp_path, prior={"num": 2, "labels": [1]})

    with pytest.raises(InputError, match="guidance"):
        changes_of(file, "sampling.guidance=2")


def test_the_order_of_a_stream_depends_on_its_workers(tmp_path):
    data = {"type": "huggingface", "path": "parquet", "data_files": "a.parquet", "streaming": True}
    file = begun(tmp_path, data=data)

    with pytest.raises(InputError, match="num_workers"):
        changes_of(file, "loader.num_workers=2")
    assert changes_of(file, "training.log_every=3")


def test_the_same_recipe_has_no_changes(tmp_path):
    file = begun(tmp_path)

    assert changes_of(file) == {}
    assert changes_of(file, f"output={tmp_path}/run") == {}


# Whole runs


pytestmark = pytest.mark.usefixtures("without_report")


def changed_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "log.jsonl") if "changed" in line]


def test_a_resume_records_its_changes_and_uses_them(tmp_path, monkeypatch):
    file, run = tiny(tmp_path, **{**BLOCKS, "training__steps": 2}), tmp_path / "run"
    command("train", file, "validation=null")
    monkeypatch.setattr(own_callback, "seen", [])

    command(
        "train",
        file,
        "training.steps=4",
        "training.log_every=2",
        "sampling.guidance=2",
        "evaluation.num_samples=7",
        "callbacks=[{type: own_callback, every: 1}]",
    )

    (line,) = changed_lines(run)
    assert line["step"] == 2
    changed = line["changed"]
    assert changed["training.steps"] == [2, 4]
    assert changed["sampling.guidance"] == [1.0, 2.0]
    assert changed["evaluation.num_samples"] == [6, 7]
    assert changed["validation.every"] == ["(absent)", 2]
    assert changed["callbacks"][0] == []
    assert own_callback.seen == [3, 4]
    log = [line["step"] for line in lines(run / "log.jsonl") if "loss" in line]
    assert log == [1, 2, 4]
    assert [line["step"] for line in lines(run / "validation.jsonl")] == [4]
    assert json.loads((run / "evaluation.json").read_text())["num_samples"] == 7
    assert "guidance: 2.0" in (run / "recipe.yaml").read_text()
    assert "- type: own_callback" in (run / "recipe.yaml").read_text()


def test_what_does_not_train_changes_no_weight(tmp_path):
    file = tiny(tmp_path, **BLOCKS, training__steps=4)
    command("train", file, f"output={tmp_path}/straight")
    command("train", file, "training.steps=2")

    changes = ["training.keep_checkpoints=1", "training.log_every=3", "loader.num_workers=1"]
    command("train", file, *changes, "validation=null", "evaluation=null")

    straight, resumed = saved(tmp_path / "straight"), saved(tmp_path / "run")
    for name, value in straight["model"].items():
        assert value.equal(resumed["model"][name]), name


def test_a_finished_run_is_exported_again_under_its_new_license(tmp_path):
    file, run = tiny(tmp_path, training__steps=2), tmp_path / "run"
    command("train", file)
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    exported = (run / "pipeline").stat().st_ino

    command("train", file, "license=CC0-1.0")

    assert (run / "pipeline").stat().st_ino != exported
    after = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    assert after == before
    assert changed_lines(run)[0]["changed"] == {"license": [None, "CC0-1.0"]}


def test_a_refused_change_leaves_the_run_as_it_is(tmp_path):
    file, run = tiny(tmp_path, training__steps=2), tmp_path / "run"
    command("train", file)
    before = (run / "recipe.yaml").read_text()

    refused("train", file, "seed=1", "training.steps=4")

    assert (run / "recipe.yaml").read_text() == before
    assert changed_lines(run) == []


@pytest.mark.parametrize(
    ("select", "change"),
    [
        ("frechet_distance", "evaluation.in_loop.num_samples=7"),
        ("precision", "evaluation.in_loop.select=frechet_distance"),
    ],
)
def test_a_changed_evaluation_in_the_loop_starts_the_search_over(tmp_path, select, change):
    """At a rate of 3 an early step has the best score, and the later ones are much worse.

    The second change compares a distance, which is positive, with the negative of a precision.
    """
    loop = {**LOOP, "metrics": ["frechet_distance", "precision_recall"], "select": select}
    settings = {"steps": 3, "batch_size": 8, "num_sampled": 0, "keep_checkpoints": 1}
    file = tiny(
        tmp_path,
        evaluation={**SCORED, "in_loop": loop},
        training=settings,
        optimizer={"name": "sgd", "lr": 3.0},
    )
    run = tmp_path / "run"
    command("train", file)
    first = saved(run)["trainer"]
    assert first["best_step"] < 3, "the search would end with the last step anyway"

    command("train", file, change, "training.steps=4")

    state = saved(run)["trainer"]
    assert state["best_step"] == 4
    assert json.loads((run / "evaluation.json").read_text())["step"] == 4
    assert [step_of(path) for path in whole(run / "checkpoints")] == [4]


def test_without_a_change_the_best_step_is_kept_over_a_resume(tmp_path):
    """The counterpart of the test above."""
    settings = {"steps": 3, "batch_size": 8, "num_sampled": 0, "keep_checkpoints": 1}
    file = tiny(
        tmp_path,
        evaluation={**SCORED, "in_loop": LOOP},
        training=settings,
        optimizer={"name": "sgd", "lr": 3.0},
    )
    run = tmp_path / "run"
    command("train", file)
    best = saved(run)["trainer"]["best_step"]
    assert best < 3

    command("train", file, "training.steps=4", "evaluation.num_samples=7")

    scores = {line["step"]: line["selected_by"] for line in lines(run / "evaluations.jsonl")}
    assert saved(run)["trainer"]["best_step"] == min(scores, key=scores.__getitem__)
    assert saved(run)["trainer"]["best_step"] in (best, 4)
