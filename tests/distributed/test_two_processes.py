"""Two gloo processes under torchrun against one: the same weights, logs, samples and scores."""

import json
import re
import signal

import PIL.Image
import pytest
import torch
from helpers.places import PROGRAMS, TESTS
from helpers.runs import (
    CLIPS,
    assert_identical,
    largest_difference,
    launched,
    lines,
    output_of,
    parameters,
    ran,
    saved,
    start,
    tiny,
    trained,
    trainer,
    wait_for_line,
)
from helpers.support import assert_close, gradients, images, term_alone

from difftrain.core.rng import Rng, permuted
from difftrain.objective.regularizers import ErrorPropagation
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.training.checkpoint import step_of, whole

pytestmark = pytest.mark.distributed

OWN = {"imports": ["helpers.own_method"], "objective__regularizers": [{"type": "own_method"}]}
SCORED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
    "num_samples": 20,
    "memorization": False,
    "in_loop": {
        "every": 5,
        "num_samples": 20,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
    },
}


def double(folder):
    """Write a recipe of ten steps in float64 with AdamW, two backwards a step on each process.

    The last batch of 898 digits spans two epochs.
    """
    training = {
        "steps": 10,
        "batch_size": 96,
        "micro_batch_size": 24,
        "log_every": 2,
        "sample_every": 5,
        "num_sampled": 20,
    }
    return tiny(
        folder,
        model__dtype="float64",
        objective__timesteps={"type": "stratified"},
        training=training,
        evaluation=SCORED,
        ema={"type": "decay", "decay": 0.9},
        **OWN,
    )


def single(folder):
    """Write a recipe of ten steps in float32, one backward a step on each process."""
    training = {"steps": 10, "batch_size": 16, "log_every": 1}
    return tiny(folder, training=training, optimizer={"name": "sgd", "lr": 0.05}, **OWN)


DIFFERENCE = {"type": "step_variation", "central": True, "step_size": 0.1}
PROPAGATION = {"type": "error_propagation", "gather": True, "checkpointing": True, "warmup": 5}


def regularized(folder):
    """Write a recipe of ten steps in float64 with AdamW and terms over the whole batch.

    The finite difference has a step so large that rounding does not matter, since AdamW divides by
    the gradient's size and so magnifies 1e-10. The other term is exact.
    """
    training = {"steps": 10, "batch_size": 16, "log_every": 2}
    exact = {
        "type": "step_variation",
        "method": "double_backward",
        "measured_batches": 3,
        "every": 2,
        "weight": 0.1,
    }
    file = tiny(
        folder / "regularized",
        training=training,
        model__dtype="float64",
        label_dropout=0.0,
        objective={"regularizers": [DIFFERENCE, exact, PROPAGATION], "timesteps": "logit_normal"},
    )
    return file.rename(folder / "regularized.yaml")


def clips(folder):
    """Write a recipe of two steps of a video model with all three regularizers."""
    file = tiny(
        folder / "clips",
        **{**CLIPS, "training": {"steps": 2, "batch_size": 8, "log_every": 1}},
        model__dtype="float64",
        objective={"regularizers": [{"type": "noise_constraint"}, DIFFERENCE, PROPAGATION]},
    )
    return file.rename(folder / "clips.yaml")


def failing(folder):
    """Write a recipe of one step with an own metric, which the second process cannot compute."""
    evaluation = {**SCORED, "metrics": ["own_metric", "frechet_distance"], "in_loop": None}
    file = tiny(
        folder / "failing",
        training={"steps": 1, "batch_size": 8},
        imports=["helpers.own_metric"],
        evaluation=evaluation,
    )
    return file.rename(folder / "failing.yaml")


def unreadable(folder):
    """Write a recipe over eight images, one of which the second process cannot read."""
    images = folder / "images"
    images.mkdir()
    for i in range(8):
        PIL.Image.new("L", (8, 8), color=10 * i).save(images / f"{i}.png")
    (images / f"{permuted(0, 4, 8)}.png").write_bytes(
        b"no image at all"
    )  # sample 4 of 8: the second process's first
    file = tiny(
        folder / "unreadable",
        data={"type": "image_folder", "path": str(images)},
        label_dropout=0.0,
        model__config__num_class_embeds=None,
    )
    file.rename(folder / "unreadable.yaml").parent.joinpath("unreadable").rmdir()


def status(run):
    found = json.loads((run / "status.json").read_text())
    return found["code"], found["message"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return the run folder of the real command on two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = ran(str(double(folder)), processes=2, PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same in this process, each step in one backward."""
    folder = tmp_path_factory.mktemp("one")
    trained(double(folder), "training.micro_batch_size=96")
    return folder / "run"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Return a run whose launcher got a signal in step 5, halfway to a line of the log."""
    folder = tmp_path_factory.mktemp("several") / "interrupted"
    run = folder / "run"
    file = str(double(folder))
    process = start(file, processes=2, OWN_METHOD="linger:4", PYTHONPATH=str(TESTS))
    try:
        wait_for_line(run / "log.jsonl", process, 2)
        process.send_signal(signal.SIGTERM)
        _, err = output_of(process)
    finally:
        process.terminate()
    return run, status(run), [step_of(path) for path in whole(run / "checkpoints")], err


@pytest.fixture(scope="module")
def several(interrupted):
    """Return the folder of many small runs on two processes, their codes, and standard error."""
    folder = interrupted[0].parents[1]
    single(folder)
    regularized(folder)
    clips(folder)
    failing(folder)
    unreadable(folder)
    process = launched([str(PROGRAMS / ("several.py")), str(folder)], processes=2)
    _, err = output_of(process)
    assert all((folder / f"codes-{rank}.json").exists() for rank in (0, 1)), err
    return folder, [json.loads((folder / f"codes-{rank}.json").read_text()) for rank in (0, 1)], err


def test_two_processes_give_one_s_weights_in_float64_with_adamw(two, one):
    for name in ("model", "ema"):
        assert largest_difference(saved(two)[name], saved(one)[name]) <= 1e-12


def test_two_processes_log_what_one_logs(two, one):
    logs = lines(two / "log.jsonl"), lines(one / "log.jsonl")

    assert [line["step"] for line in logs[0]] == [2, 4, 6, 8, 10]
    for found, expected in zip(*logs, strict=True):
        assert found["terms"].keys() == expected["terms"].keys()
        assert_close(
            [found["loss"], *found["terms"].values()],
            [expected["loss"], *expected["terms"].values()],
            absolute=1e-12,
        )
        assert_close(found["grad_norm"], expected["grad_norm"], relative=1e-11)
        assert [band["count"] for band in found["bands"]] == [
            band["count"] for band in expected["bands"]
        ]


def test_two_processes_generate_one_s_images_byte_for_byte_and_the_same_score(two, one):
    for step in (5, 10):
        name = f"samples/step-{step:07d}.png"
        assert (two / name).read_bytes() == (one / name).read_bytes()
    for found, expected in zip(
        lines(two / "evaluations.jsonl"), lines(one / "evaluations.jsonl"), strict=True
    ):
        score, other = (
            found["scores"].pop("frechet_distance"),
            expected["scores"].pop("frechet_distance"),
        )
        assert found == expected
        assert found["num_samples"] == 20
        assert_close(
            score["value"], other["value"], relative=1e-9
        )  # sums over two processes, in float64


def test_two_processes_leave_a_whole_run(two):
    assert status(two) == (0, "trained 10 steps; final weights of step 10")
    assert json.loads((two / "evaluation.json").read_text())["num_samples"] == 20
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert (two / "pipeline").is_dir()


def test_a_signal_to_the_launcher_stops_both_after_saving(interrupted):
    _, (code, message), checkpoints, err = interrupted

    assert code == 75, err
    assert "stopped by a signal at step 5, saved" in message
    assert checkpoints == [5]
    assert "KeyboardInterrupt" not in err


def test_the_same_command_then_goes_on_as_if_nothing_had_been(two, interrupted, several):
    """Bit for bit, with the same number of processes."""
    run, codes = interrupted[0], several[1]

    assert [own["resumed"] for own in codes] == [0, 0]
    assert_identical(saved(run), saved(two))
    assert_identical(lines(run / "log.jsonl"), lines(two / "log.jsonl"))
    assert_identical(lines(run / "evaluations.jsonl"), lines(two / "evaluations.jsonl"))


def test_two_processes_give_one_s_weights_in_float32_with_sgd(several, tmp_path):
    trained(single(tmp_path))

    assert (
        largest_difference(saved(several[0] / "sgd")["model"], saved(tmp_path / "run")["model"])
        <= 1e-6
    )


def test_the_first_gradient_is_that_of_one_process(several, tmp_path):
    """With a rate of 1 and no clipping the first step is the gradient."""
    made = trainer(
        single(tmp_path), "optimizer.lr=1.0", "training.steps=1", "training.clip_norm=null"
    )
    start = parameters(made)
    made.run()
    two = saved(several[0] / "gradient")["model"]
    expected = {name: start[name] - p for name, p in parameters(made).items()}
    found = {name: start[name] - two[name] for name in start}

    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 0.01
    assert largest_difference(found, expected) <= 1e-5 * scale


def assert_same_log(found, expected, absolute):
    for one, other in zip(lines(found / "log.jsonl"), lines(expected / "log.jsonl"), strict=True):
        for kind in ("terms", "measures"):
            assert one[kind].keys() == other[kind].keys()
            assert_close(list(one[kind].values()), list(other[kind].values()), absolute=absolute)


def test_two_processes_give_one_s_weights_and_terms_with_regularizers_in_float64_with_adamw(
    several, tmp_path
):
    trained(regularized(tmp_path), f"output={tmp_path / 'run'}")
    two, one = several[0] / "regularized", tmp_path / "run"

    assert largest_difference(saved(two)["model"], saved(one)["model"]) <= 1e-12
    assert_same_log(two, one, 1e-11)
    for name, value in saved(one)["state"]["objective"].items():
        assert_close(saved(two)["state"]["objective"][name], value, relative=1e-12)
    assert lines(one / "log.jsonl")[-1]["terms"].keys() == {
        "error",
        "step_variation",
        "step_variation_2",
        "error_propagation",
    }
    assert "error_propagation.u_statistic" in lines(one / "log.jsonl")[-1]["measures"]


def test_two_processes_give_one_s_weights_with_regularizers_in_float32_with_sgd(several, tmp_path):
    """Ten steps of size 0.02, with a finite difference in float32.

    Over a step of 0.1 its rounding is some 1e-6, and differs with the order of summation.
    """
    changes = ["optimizer={name: sgd, lr: 0.02}", "model.dtype=float32"]
    made = trained(regularized(tmp_path), f"output={tmp_path / 'run'}", *changes)

    assert (
        largest_difference(
            saved(several[0] / "regularized_sgd")["model"], saved(tmp_path / "run")["model"]
        )
        <= 1e-6
    )
    assert made.progress.step == 10


def test_two_processes_give_one_s_weights_of_a_video_model_with_all_regularizers(
    several, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.nn.Dropout.forward", lambda self, x: x)
    trained(clips(tmp_path), f"output={tmp_path / 'run'}")
    two, one = several[0] / "clips", tmp_path / "run"

    assert largest_difference(saved(two)["model"], saved(one)["model"]) <= 1e-12
    assert_same_log(two, one, 1e-11)
    assert lines(one / "log.jsonl")[-1]["terms"]["noise_constraint"] > 0


def discrepancy(rows, step):
    """Return what one process finds for these samples, as several.py does for its own."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 2, 1).double()
    objective = term_alone(ErrorPropagation(), "v_prediction", NoiseSchedule.linear())
    losses = objective(
        lambda x, t, cond: layer(x), Batch(images(10)[rows]), Rng(0, step, rows, batch_size=10)
    )
    return (
        losses.total.item(),
        gradients(losses, layer),
        losses.measures["error_propagation.u_statistic"].item(),
    )


@pytest.mark.parametrize("step", range(3))
def test_gathered_halves_give_the_whole_batch_s_value_and_gradient(several, step):
    """The first process rolls three samples and noises two, the second two and three."""
    value, gradient, u = discrepancy(range(10), step)
    for own in several[1]:
        found, averaged, measures = own["gathered"][step]
        assert_close(found, value, relative=1e-12)
        assert_close(averaged, gradient, absolute=1e-12 * gradient.abs().max().item())
        assert_close(measures["error_propagation.u_statistic"], u, relative=1e-11)


@pytest.mark.parametrize("step", range(3))
def test_halves_that_are_not_gathered_are_each_process_s_own(several, step):
    alone = [discrepancy(rows, step) for rows in (range(5), range(5, 10))]
    for own, (value, _, _) in zip(several[1], alone, strict=True):
        assert_close(own["local"][step][0], value, relative=1e-12)
        assert_close(
            own["local"][step][1], (alone[0][1] + alone[1][1]) / 2, relative=1e-9, absolute=1e-12
        )
    assert abs(alone[0][0] - alone[1][0]) > 1e-6


def test_a_signal_to_one_process_stops_both_at_the_same_step(several):
    folder, codes, _ = several

    assert [own["stopped"] for own in codes] == [75, 75]
    assert status(folder / "stopped")[0] == 75
    assert [step_of(path) for path in whole(folder / "stopped/checkpoints")] == [5]


def test_a_term_that_is_not_finite_on_one_process_stops_both_before_the_update(several):
    folder, codes, said = several

    assert [own["nan"] for own in codes] == [1, 1]
    assert said.count("step 3: own_method and gradient norm are not finite") == 1
    assert status(folder / "nan")[0] == 1
    assert [step_of(path) for path in whole(folder / "nan/checkpoints")] == [2]


def test_a_checkpoint_that_could_not_be_written_ends_both_with_one_message(several):
    folder, codes, said = several

    assert [own["full"] for own in codes] == [2, 2]
    assert said.count("the checkpoint of step 4 could not be written") == 1
    assert [path.name for path in (folder / "full/checkpoints").iterdir()] == ["step-0000002"]


def test_a_score_that_fails_on_one_process_fails_on_both_after_the_export(several):
    """The second start of the same run, where the metric works, ends well."""
    folder, codes, said = several

    assert [own["failing"] for own in codes] == [[1, 0], [1, 0]]
    assert said.count("own_one: ValueError: the second cannot count") == 1
    assert (folder / "failing" / "pipeline").is_dir()
    assert status(folder / "failing")[0] == 0
    scores = json.loads((folder / "failing" / "evaluation.json").read_text())["scores"]
    assert {"own_one", "own_two", "frechet_distance"} <= set(scores)


def test_a_wrong_recipe_has_one_message(several):
    _, codes, said = several

    assert [own["no_such_file"] for own in codes] == [2, 2]
    assert said.count("there is no recipe") == 1


def test_what_one_process_finds_wrong_is_raised_on_all_and_what_the_main_one_does_is_known_to_all(
    several,
):
    _, codes, _ = several

    assert [own["processes"] for own in codes] == [2, 2]
    assert [own["on_all"] for own in codes] == ["refused: the second has no such folder"] * 2
    assert [own["on_main"] for own in codes] == ["by 0"] * 2


def test_an_image_that_only_the_second_process_cannot_read_has_one_message(several):
    """The first process then loses its partner, which is a consequence and has no message."""
    folder, codes, said = several
    message = r"\d\.png cannot be read: not in an image format"

    assert [own["unreadable"] for own in codes] == [2, 2]
    assert len(re.findall(message, said)) == 1
    code, written = status(folder / "unreadable")
    assert code == 2
    assert re.search(message, written)


def test_there_is_no_other_message(several):
    said = several[2]

    assert len(re.findall("^error: ", said, re.MULTILINE)) == 5
    own, _, _ = said.partition("torch.distributed.elastic")
    lines_of_errors = [line for line in own.splitlines() if "Error: " in line]
    # The own metric's traceback is there for whoever wrote it.
    assert all("the second cannot count" in line for line in lines_of_errors), lines_of_errors
