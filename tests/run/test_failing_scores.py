"""Export comes before the scores: a score that fails leaves a finished training with its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import own_metric
from helpers.commands import Outcome, command, pictures, refused
from helpers.runs import lines, tiny
from helpers.tiny_networks import UNLABELLED

from difftrain.core.errors import InputError
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.training.trainer import Trainer

SCORED: dict[str, Any] = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance", "own_metric"],
    "num_samples": 6,
}
OWN = {"imports": ["helpers.own_metric"], "evaluation": SCORED}


def raises(error: Exception):
    """Return a function that raises an error."""

    def action() -> float:
        raise error

    return action


def status(run: Path) -> tuple[int, str]:
    found = json.loads((run / "status.json").read_text())
    return found["code"], found["message"]


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def made(run: Path) -> dict[Path, int]:
    """Return when each file of training and export was written."""
    files = [*run.glob("checkpoints/**/*"), *run.glob("pipeline/**/*")]
    files += [run / "log.jsonl", run / "samples" / "final.png"]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def assert_exported(run: Path) -> None:
    assert (run / "pipeline" / "unet" / "config.json").is_file()
    assert (run / "samples" / "final.png").is_file()
    assert "<html" in (run / "report.html").read_text()


# Own metrics


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ValueError("no such number"), 1, "ValueError: no such number"),
        (KeyError("absent"), 1, "KeyError: 'absent'"),
        (InputError("its file is gone. Write another."), 2, "its file is gone. Write another."),
    ],
    ids=["value error", "key error", "input error"],
)
def test_a_metric_that_fails_leaves_the_export_and_the_other_scores(
    tmp_path, monkeypatch, error, code, reason
):
    file, run = tiny(tmp_path, training__steps=2, **OWN), tmp_path / "run"
    monkeypatch.setattr(own_metric, "action", raises(error))

    outcome = command("train", file, code=code)

    assert_exported(run)
    found = evaluation(run)
    assert found["scores"]["frechet_distance"]["value"] > 0
    assert set(found["scores"]) == {"frechet_distance", "nearest_neighbour_ratio"}
    assert found["failed"] == {"own_one": reason, "own_two": reason}
    assert status(run)[0] == code
    assert f"own_one: {reason}" in status(run)[1]
    assert outcome.error.startswith("error: training and export are done, but scores failed: ")
    assert outcome.error.count("error: ") == 1
    assert "own_one" in (run / "report.html").read_text()
    assert "Traceback" not in outcome.error


def test_input_that_is_wrong_and_an_error_of_the_code_end_as_an_error_of_the_code(
    tmp_path, monkeypatch
):
    """One of two metrics may be mended by other input, but not both."""
    evaluation = {**SCORED, "metrics": ["own_metric", "frechet_distance"]}
    file = tiny(tmp_path, training__steps=1, **{**OWN, "evaluation": evaluation})
    monkeypatch.setattr(own_metric, "action", raises(InputError("wrong")))
    name = "difftrain.evaluation.metrics.frechet.FrechetDistance.__call__"
    monkeypatch.setattr(name, lambda self, evidence: raises(RuntimeError("broken"))())

    command("train", file, code=1)

    assert set(evaluation_of(tmp_path)["failed"]) == {"own_one", "own_two", "frechet_distance"}


def evaluation_of(folder: Path) -> dict[str, Any]:
    return evaluation(folder / "run")


def test_the_same_command_tries_just_the_scores(tmp_path, monkeypatch):
    file, run = tiny(tmp_path, training__steps=2, **OWN), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(own_metric, "action", raises(ValueError("not yet")))
        command("train", file, code=1)
        before = made(run)
        command("train", file, code=1)
        assert made(run) == before
    assert len(before) > 6

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", raises(AssertionError("a trainer was built")))
        command("train", file)

    assert made(run) == before
    assert evaluation(run)["scores"]["own_two"]["value"] == 1.0
    assert "failed" not in evaluation(run)
    assert status(run) == (0, "trained 2 steps; final weights of step 2")
    assert "is done: 2 steps" in command("train", file).out


def test_a_metric_may_be_taken_out_without_a_word(tmp_path, monkeypatch):
    file, run = tiny(tmp_path, training__steps=2, **OWN), tmp_path / "run"
    monkeypatch.setattr(own_metric, "action", raises(ValueError("never")))
    command("train", file, code=1)
    before = made(run)
    del before[run / "log.jsonl"]

    command("train", file, "evaluation.metrics=[frechet_distance]")

    after = made(run)
    del after[run / "log.jsonl"]
    assert after == before
    assert "failed" not in evaluation(run)
    assert set(evaluation(run)["scores"]) == {"frechet_distance", "nearest_neighbour_ratio"}
    assert status(run)[0] == 0
    changed = lines(run / "log.jsonl")[-1]
    assert changed["step"] == 2
    assert list(changed["changed"]) == ["evaluation.metrics"]


@pytest.mark.usefixtures("without_report")
def test_evaluate_ends_with_the_same_codes(tmp_path, monkeypatch):
    command("train", tiny(tmp_path, training__steps=1, **OWN))
    run = tmp_path / "run"

    for error, code in ((ValueError("no"), 1), (InputError("wrong"), 2)):
        monkeypatch.setattr(own_metric, "action", raises(error))
        outcome: Outcome = command("evaluate", run, code=code)
        assert set(evaluation(run)["failed"]) == {"own_one", "own_two"}
        assert "own_one" in outcome.out


# References and training images


def of_pictures(folder: Path) -> Path:
    """Write a recipe of images from a folder, scored on others."""
    config = {**UNLABELLED, "in_channels": 3, "out_channels": 3}
    data = pictures(folder / "photos", num=12)
    reference = pictures(folder / "held_out", num=9, size=(9, 9))
    return tiny(
        folder,
        model={"type": "unet2d", "config": config},
        data={"type": "image_folder", "path": str(data)},
        label_dropout=0.0,
        transform={"resolution": 8},
        training__steps=2,
        training__batch_size=4,
        evaluation={
            **SCORED,
            "reference": {"type": "image_folder", "path": str(reference)},
            "metrics": ["frechet_distance"],
        },
    )


def vanishing(monkeypatch, folder: Path) -> None:
    """Remove a folder when training is over."""
    run = Trainer.run

    def then_remove(self: Trainer) -> bool:
        finished = run(self)
        shutil.rmtree(folder)
        return finished

    monkeypatch.setattr(Trainer, "run", then_remove)


def test_a_reference_that_vanishes_during_training_ends_with_2_after_the_export(
    tmp_path, monkeypatch
):
    file, run = of_pictures(tmp_path), tmp_path / "run"
    shutil.copytree(tmp_path / "held_out", tmp_path / "kept")
    with monkeypatch.context() as patched:
        vanishing(patched, tmp_path / "held_out")
        message = refused("train", file)

    assert "held_out" in message
    assert_exported(run)
    assert set(evaluation(run)["failed"]) == {"frechet_distance"}
    assert evaluation(run)["scores"] == {}
    assert status(run)[0] == 2
    before = made(run)
    assert "held_out' does not exist" in refused("train", file)
    (tmp_path / "kept").rename(tmp_path / "held_out")
    command("train", file)
    assert made(run) == before
    assert evaluation(run)["scores"]["frechet_distance"]["value"] > 0


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("error", [ValueError("no"), InputError("no")], ids=["code", "input"])
def test_the_memorization_check_that_nobody_asked_for_fails_no_run(tmp_path, monkeypatch, error):
    file, run = of_pictures(tmp_path), tmp_path / "run"
    monkeypatch.setattr(NearestNeighbourRatio, "__call__", lambda *given: raises(error)())

    command("train", file)

    found = evaluation(run)
    assert "failed" not in found
    assert found["left_out"]["nearest_neighbour_ratio"].endswith("no")
    assert set(found["scores"]) == {"frechet_distance"}
    assert status(run)[0] == 0


@pytest.mark.usefixtures("without_report")
def test_the_memorization_check_fails_a_run_that_asks_for_it(tmp_path, monkeypatch):
    file, run = of_pictures(tmp_path), tmp_path / "run"
    monkeypatch.setattr(NearestNeighbourRatio, "__call__", lambda *given: raises(ValueError())())
    metrics = "evaluation.metrics=[frechet_distance, nearest_neighbour_ratio]"

    command("train", file, metrics, code=1)

    assert set(evaluation(run)["failed"]) == {"nearest_neighbour_ratio"}


@pytest.mark.usefixtures("without_report")
def test_training_images_that_vanish_during_training_are_not_needed_by_evaluate(
    tmp_path, monkeypatch
):
    """The scores of the run compare with them, so it ends with 2, but its files are there."""
    file, run = of_pictures(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patched:
        vanishing(patched, tmp_path / "photos")
        assert "photos" in refused("train", file)
    assert (run / "pipeline" / "unet").is_dir()

    command("evaluate", run)

    found = evaluation(run)
    assert found["scores"]["frechet_distance"]["value"] > 0
    assert set(found["left_out"]) == {"nearest_neighbour_ratio"}
