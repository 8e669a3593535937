"""Whole runs in this process: exit codes, messages, status.json, and what a second start finds."""

import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import PIL.Image
import pytest
import torch
from accelerate.utils import is_comet_ml_available
from helpers.runs import (
    assert_identical,
    lines,
    output_of,
    saved,
    start,
    terminations_fail,
    tiny,
    trainer,
    wait_for_line,
)

from difftrain.run import folder as run_folder
from difftrain.run.session import train
from difftrain.training.checkpoint import step_of, whole

pytestmark = pytest.mark.usefixtures("without_report")

OWN = {"imports": ["helpers.own_method"], "objective": {"regularizers": [{"type": "own_method"}]}}
SCORED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
    "num_samples": 6,
}
METHOD = '''
from dataclasses import dataclass

import torch
from difftrain.objective.slots import WEIGHTINGS

@WEIGHTINGS.register("half_{name}")
@dataclass(frozen=True)
class Half:
    """w = 1 / 2."""
    stated_for = None

    def __call__(self, level):
        return torch.full_like(level.alpha, 0.5)
'''


@pytest.fixture(autouse=True)
def own_signals():
    with terminations_fail():
        yield


@pytest.fixture(autouse=True)
def all_messages(caplog):
    """Let the library's messages of every level through, as the commands do."""
    caplog.set_level(logging.INFO, "difftrain")


@pytest.fixture
def file_size_limit():
    """Restore the limit on file sizes, which own_method lowers to fill the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def status(folder):
    found = json.loads((folder / "status.json").read_text())
    return found["code"], found["message"]


def message_of(capsys):
    """Return what is on standard error: one message, no traceback."""
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "\nerror: " not in err
    assert "Traceback" not in err
    return err


def logged(run):
    """Return the lines of a run's log that are about steps, not about changes of the recipe."""
    return [line for line in lines(run / "log.jsonl") if "loss" in line]


def files_in(folder):
    """Return the content and the time of every file but the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def pictures(folder, num=12, broken=()):
    """Write grey 8 x 8 images, some of them unreadable; returns changes of the tiny recipe."""
    folder.mkdir()
    for i in range(num):
        file = folder / f"{i:02d}.png"
        if i in broken:
            file.write_bytes(b"no image at all")
        else:
            PIL.Image.new("L", (8, 8), color=10 * i).save(file)
    return {
        "data": {"type": "image_folder", "path": str(folder)},
        "model__config__num_class_embeds": None,
        "label_dropout": 0.0,
    }


def test_a_run_leaves_what_the_contract_says_and_a_second_start_changes_nothing(tmp_path, caplog):
    file, run = tiny(tmp_path, evaluation=SCORED, ema={"type": "decay"}), tmp_path / "run"

    assert train(str(file)) == 0

    assert status(run) == (0, "trained 6 steps; final weights of step 6")
    files = {
        "recipe.yaml",
        "facts.json",
        "finished.json",
        "weights.json",
        "log.jsonl",
        "status.json",
        "evaluation.json",
        "scores.jsonl",
        "report.html",
        "environment.json",
        "diagnostics.json",
    }
    assert {path.name for path in run.iterdir()} == files | {
        "checkpoints",
        "samples",
        "pipeline",
        "features",
        ".lock",
    }
    assert json.loads((run / "evaluation.json").read_text())["weights"] == "ema"
    before = files_in(run)
    caplog.clear()

    assert train(str(file)) == 0

    assert f"{run} is done: 6 steps" in caplog.text
    assert files_in(run) == before


def test_the_weights_of_a_run_are_those_of_its_objective(tmp_path):
    schedule = {"type": "linear", "num_timesteps": 50, "zero_terminal_snr": True}
    parts = {"parameterization": "v_prediction", "objective": {"weighting": {"type": "min_snr"}}}
    assert train(str(tiny(tmp_path, schedule=schedule, training__steps=1, **parts))) == 0

    weights = json.loads((tmp_path / "run/weights.json").read_text())

    *log_snr, at_the_end = weights["log_snr"]
    snr = [math.exp(x) for x in log_snr]
    assert (weights["trained_error"], weights["t"], at_the_end) == (
        "v_prediction",
        list(range(50)),
        None,
    )
    assert weights["weight"] == pytest.approx([*(min(x, 5) / (x + 1) for x in snr), 0.0])
    assert weights["weight_on_epsilon"][:-1] == pytest.approx([min(x, 5) / x for x in snr])


def test_a_finished_run_goes_on_when_its_steps_are_raised(tmp_path, caplog):
    file = tiny(tmp_path, training__steps=2)
    assert train(str(file)) == 0

    assert train(str(file), ["training.steps=3"]) == 0

    assert "resuming" in caplog.text
    assert status(tmp_path / "run") == (0, "trained 3 steps; final weights of step 3")
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3]
    assert "steps: 3\n" in (tmp_path / "run/recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("place", "when"),
    [("TrainingRun.callbacks", "before its first"), ("export", "after its last")],
)
def test_a_signal_outside_of_the_steps_ends_the_run_where_it_stands_and_the_next_does_the_rest(
    tmp_path, monkeypatch, place, when
):
    """While parts are built, or while the run is exported and scored."""
    file, run = tiny(tmp_path, evaluation=SCORED), tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(
            f"difftrain.run.session.{place}", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        )
        with pytest.raises(SystemExit) as left:
            train(str(file))

    assert left.value.code == 75
    assert status(run) == (
        75,
        f"stopped by a signal {when} step; run the same command again to go on",
    )
    assert signal.getsignal(signal.SIGTERM) is handler
    assert train(str(file)) == 0
    assert status(run)[0] == 0
    assert (run / "pipeline").is_dir()


@pytest.mark.parametrize("name", ["terminate", "interrupt"])
def test_a_stopped_run_says_so_and_the_same_command_goes_on(tmp_path, monkeypatch, name):
    file, run = tiny(tmp_path, **OWN), tmp_path / "run"
    monkeypatch.setenv("OWN_METHOD", f"{name}:3")

    assert train(str(file)) == 75

    code, message = status(run)
    assert code == 75
    assert "stopped by a signal at step 4, saved; run the same command again" in message
    assert [step_of(path) for path in whole(run / "checkpoints")] == [4]
    assert not (run / "pipeline").exists()
    monkeypatch.delenv("OWN_METHOD")
    assert train(str(file)) == 0
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_last_step_leaves_the_scoring_to_the_next_run(tmp_path, monkeypatch):
    file, run = tiny(tmp_path, evaluation=SCORED, **OWN), tmp_path / "run"
    monkeypatch.setenv("OWN_METHOD", "terminate:5")

    assert train(str(file)) == 75
    assert not (run / "evaluation.json").exists()
    assert train(str(file)) == 0
    assert (run / "evaluation.json").exists()


def test_a_term_that_is_not_finite_ends_with_code_1_and_one_message(tmp_path, monkeypatch, capsys):
    file, run = tiny(tmp_path, **OWN), tmp_path / "run"
    monkeypatch.setenv("OWN_METHOD", "nan:3")

    assert train(str(file)) == 1

    said = message_of(capsys)
    assert "step 4: own_method" in said
    assert status(run) == (1, said.removeprefix("error: ").strip())
    assert [step_of(path) for path in whole(run / "checkpoints")] == [3]
    monkeypatch.delenv("OWN_METHOD")
    assert train(str(file)) == 0


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        ("die", ConnectionError, "ConnectionError: as if killed"),
        ("interrupt_at_once", KeyboardInterrupt, "KeyboardInterrupt"),
    ],
)
def test_another_error_is_in_the_status_and_comes_out_as_it_is(
    tmp_path, monkeypatch, action, error, message
):
    monkeypatch.setenv("OWN_METHOD", f"{action}:1")

    with pytest.raises(error):
        train(str(tiny(tmp_path, **OWN)))

    assert status(tmp_path / "run") == (1, message)


def test_a_module_beside_the_recipe_brings_its_own_method(tmp_path):
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(METHOD.format(name=name))
    changes = {"imports": [name], "objective": {"weighting": {"type": f"half_{name}"}}}
    try:
        assert train(str(tiny(tmp_path, training__steps=1, **changes))) == 0
        assert train(str(tiny(tmp_path, training__steps=1)), [f"output={tmp_path}/plain"]) == 0
    finally:
        sys.path.remove(str(tmp_path))

    (half,), (whole_loss,) = lines(tmp_path / "run/log.jsonl"), lines(tmp_path / "plain/log.jsonl")
    assert half["loss"] == pytest.approx(whole_loss["loss"] / 2, rel=1e-6)


def test_a_module_that_is_not_there_is_wrong_input(tmp_path, capsys):
    assert train(str(tiny(tmp_path, imports=["no_such_module_of_mine"]))) == 2
    assert "imports.0: cannot import 'no_such_module_of_mine'" in message_of(capsys)
    assert not (tmp_path / "run").exists()


def test_another_recipe_is_refused_unless_it_is_accepted(tmp_path, capsys):
    file, run = tiny(tmp_path, training__steps=2), tmp_path / "run"
    assert train(str(file)) == 0
    before = files_in(run)

    assert train(str(file), ["optimizer.lr=0.5"]) == 2
    said = message_of(capsys)
    assert "-  lr: 0.001\n+  lr: 0.5" in said
    assert "--accept-changes" in said
    assert files_in(run) == before

    changes = ["optimizer.lr=0.5", "optimizer.weight_decay=0.25", "training.steps=3"]
    assert train(str(file), changes, accept_changes=True) == 0
    assert [line["lr"] for line in logged(run)] == [0.001, 0.001, 0.5]
    assert saved(run)["state"]["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    assert "lr: 0.5\n" in (run / "recipe.yaml").read_text()


def test_accepted_changes_that_the_checkpoint_cannot_bear_are_refused_and_it_stays(
    tmp_path, capsys
):
    file, run = tiny(tmp_path, training__steps=2), tmp_path / "run"
    assert train(str(file)) == 0

    code = train(
        str(file),
        ["training.steps=3", "model.config.block_out_channels=[8, 8]"],
        accept_changes=True,
    )

    assert code == 2
    assert "step-0000002 cannot be resumed: " in message_of(capsys)
    assert [step_of(path) for path in whole(run / "checkpoints")] == [2]


def test_fresh_starts_over_in_a_new_folder(tmp_path):
    file, run = tiny(tmp_path, training__steps=1), tmp_path / "run"
    assert train(str(file)) == 0
    before = files_in(run)

    assert train(str(file), fresh=True) == 0

    assert files_in(run) == before
    assert status(tmp_path / "run-2")[0] == 0
    assert f"output: {tmp_path}/run-2\n" in (tmp_path / "run-2/recipe.yaml").read_text()
    assert_identical(saved(tmp_path / "run-2")["model"], saved(run)["model"])


def test_a_folder_that_another_run_holds_is_refused_and_nothing_in_it_changes(tmp_path, capsys):
    file, run = tiny(tmp_path, training__steps=1), tmp_path / "run"
    assert train(str(file)) == 0
    run_folder.write_status(run, None, "running")
    before = files_in(run)

    with run_folder.held(run):
        assert train(str(file), ["training.steps=2"]) == 2

    assert "is held by another run" in message_of(capsys)
    assert files_in(run) == before
    assert train(str(file), ["training.steps=2"]) == 0


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("years of work")

    assert train(str(tiny(tmp_path))) == 2

    assert "holds other files and no run" in message_of(capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_built(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert train(str(tiny(tmp_path, output=str(tmp_path / "file/run")))) == 2

    assert "cannot be written to (Not a directory)" in message_of(capsys)


def test_a_disk_that_is_full_at_a_save_leaves_the_checkpoint_to_go_on_from(
    tmp_path, capsys, monkeypatch, file_size_limit
):
    settings = {
        "steps": 6,
        "batch_size": 8,
        "checkpoint_every": 2,
        "log_every": 3,
        "num_sampled": 0,
    }
    file, run = tiny(tmp_path, training=settings, **OWN), tmp_path / "run"
    monkeypatch.setenv("OWN_METHOD", "fill:3")

    code = train(str(file))
    file_size_limit()

    assert code == 2
    said = message_of(capsys)
    assert "the checkpoint of step 4 could not be written" in said
    assert f"The latest whole one is {run}/checkpoints/step-0000002" in said
    assert status(run) == (2, said.removeprefix("error: ").strip())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000002"]
    monkeypatch.delenv("OWN_METHOD")
    assert train(str(file)) == 0
    assert [line["step"] for line in logged(run)] == [3, 6]


def test_a_disk_that_is_full_anywhere_else_is_one_message_too(tmp_path, capsys, monkeypatch):
    """The log's line finds no room on a real disk of 40 kB."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        assert (
            train(
                str(
                    tiny(
                        tmp_path,
                        training={
                            "steps": 200,
                            "batch_size": 1,
                            "log_every": 1,
                            "checkpoint_every": 1000,
                        },
                    )
                )
            )
            == 2
        )
        assert "the disk is full (No space left on device" in message_of(capsys)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, capsys):
    changes = pictures(tmp_path / "images", broken=[3])

    assert train(str(tiny(tmp_path, **changes))) == 2

    said = message_of(capsys)
    assert f"{tmp_path}/images/03.png cannot be read: not in an image format" in said
    assert "on_error: skip" in said
    assert status(tmp_path / "run")[0] == 2
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_that_is_skipped_is_recorded_once_however_often_it_is_met(
    tmp_path, num_workers
):
    """Four epochs, and a stop after two of them."""
    changes = pictures(tmp_path / "images", broken=[3, 7])
    loading = {"on_error": "skip", "num_workers": num_workers}
    file = tiny(
        tmp_path,
        loader=loading,
        training={"steps": 4, "batch_size": 12, "num_sampled": 0},
        **changes,
    )

    assert train(str(file), ["training.steps=2"]) == 0
    assert train(str(file)) == 0

    records = lines(tmp_path / "run/skipped.jsonl")
    assert sorted(record["name"] for record in records) == [
        f"{tmp_path}/images/{name}.png" for name in ("03", "07")
    ]
    assert {record["step"] for record in records} == {1}
    assert all("not in an image format" in record["reason"] for record in records)


def test_a_class_id_beyond_the_model_s_is_named(tmp_path, capsys):
    changes = pictures(tmp_path / "images")
    changes["data"]["labels"] = "metadata"
    text = [
        json.dumps({"file_name": f"{i:02d}.png", "label": 5 if i == 7 else i % 2})
        for i in range(12)
    ]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(text))

    assert (
        train(
            str(
                tiny(
                    tmp_path,
                    **{**changes, "model__config__num_class_embeds": 3, "label_dropout": 0.1},
                )
            )
        )
        == 2
    )

    assert "the data holds the class id 5, but the model has 2 classes, ids 0 to 1" in message_of(
        capsys
    )


def test_tensorboard_is_written_into_the_folder_of_the_run(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    file = tiny(
        tmp_path,
        training={"steps": 4, "batch_size": 8, "log_every": 2, "trackers": ["tensorboard"]},
    )
    assert train(str(file)) == 0
    assert train(str(file), fresh=True) == 0

    for folder in ("run", "run-2"):
        found = events.EventAccumulator(str(tmp_path / folder / "tensorboard"))
        found.Reload()
        shown = {
            name: [(event.step, event.value) for event in found.Scalars(name)]
            for name in ("loss", "terms/error", "lr", "grad_norm")
        }
        log = lines(tmp_path / folder / "log.jsonl")
        assert shown["loss"] == [(line["step"], pytest.approx(line["loss"])) for line in log]
        assert shown["terms/error"] == [
            (line["step"], pytest.approx(line["terms"]["error"])) for line in log
        ]


def test_an_unknown_tracker_is_named(tmp_path, capsys):
    assert train(str(tiny(tmp_path, training__trackers=["tensorbored"]))) == 2

    said = message_of(capsys)
    assert "training.trackers: " in said
    assert "tensorbored" in said


@pytest.mark.filterwarnings("ignore:`log_with:UserWarning")
def test_a_tracker_that_is_not_installed_is_named(tmp_path, capsys):
    if is_comet_ml_available():
        pytest.skip("comet_ml is installed")

    assert train(str(tiny(tmp_path, training__trackers=["comet_ml"]))) == 2

    assert "training.trackers: the package of 'comet_ml' is not installed" in message_of(capsys)


def test_the_final_weights_are_the_best_ones_when_a_score_picks_them(tmp_path):
    loop = {
        "every": 1,
        "num_samples": 6,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
        "select": "frechet_distance",
    }
    evaluation = {**SCORED, "in_loop": loop}
    settings = {"steps": 4, "batch_size": 8, "num_sampled": 0, "keep_checkpoints": 1}
    file, run = (
        tiny(
            tmp_path, evaluation=evaluation, training=settings, optimizer={"name": "sgd", "lr": 3.0}
        ),
        tmp_path / "run",
    )

    assert train(str(file)) == 0

    scores = {line["step"]: line["selected_by"] for line in lines(run / "evaluations.jsonl")}
    best = min(scores, key=scores.get)
    assert json.loads((run / "evaluation.json").read_text())["step"] == best
    assert [step_of(path) for path in whole(run / "checkpoints")] == sorted({best, 4})
    assert status(run)[1] == f"trained 4 steps; final weights of step {best}"


def test_resuming_needs_no_more_than_the_folder(tmp_path, monkeypatch):
    """The trainer's own objects are gone: another process, or this one, finds all in the folder."""
    file = tiny(tmp_path, training={"steps": 4, "batch_size": 8, "checkpoint_every": 2})
    assert train(str(file), ["training.steps=2"]) == 0
    torch.manual_seed(12345)
    torch.rand(100)

    assert train(str(file)) == 0

    straight = trainer(
        tiny(tmp_path / "straight", training={"steps": 4, "batch_size": 8, "checkpoint_every": 2})
    )
    straight.run()
    assert_identical(saved(tmp_path / "run")["model"], saved(tmp_path / "straight/run")["model"])


@pytest.mark.distributed
def test_a_process_that_is_asked_to_stop_leaves_with_75(tmp_path):
    file, run = (
        tiny(tmp_path, training={"steps": 100_000, "batch_size": 8, "log_every": 1}),
        tmp_path / "run",
    )
    process = start(str(file))
    try:
        wait_for_line(run / "log.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, err = output_of(process)
    finally:
        process.kill()

    assert process.returncode == 75, err
    assert status(run)[0] == 75
    newest = step_of(whole(run / "checkpoints")[-1])
    assert lines(run / "log.jsonl")[-1]["step"] == newest
