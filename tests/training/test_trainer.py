"""The loop in one process: accumulation against large batches, resumed against straight runs."""

import itertools
import json
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import command
from helpers.fine_tuning import recipe
from helpers.runs import (
    CLIPS,
    UNET,
    assert_identical,
    largest_difference,
    lines,
    parameters,
    saved,
    terminations_fail,
    tiny,
    trained,
    trainer,
)
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.transform import to_unit_range
from difftrain.objective.schedule import diffuse
from difftrain.objective.slots import REGULARIZERS
from difftrain.training import checkpoint
from difftrain.training.callbacks import Callback
from difftrain.training.ema import ConstantDecay
from difftrain.training.lr import Cosine
from difftrain.training.settings import Training
from difftrain.training.signals import StopRequest
from difftrain.training.trainer import NotFinite, Progress

OWN = {"imports": ["helpers.own_method"], "objective": {"regularizers": [{"type": "own_method"}]}}
FLOAT64 = {"model__dtype": "float64"}
SCORED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
    "in_loop": {
        "every": 2,
        "num_samples": 6,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
    },
}


def everything(folder, **changes):
    """Write a recipe with everything that must survive a stop.

    Dropout, dropped labels, an average, a term with state, a half-full log window.
    """
    training = {
        "steps": 6,
        "batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 2,
        "checkpoint_every": 3,
        "keep_checkpoints": 9,
    }
    return tiny(
        folder,
        model__config__dropout=0.2,
        ema={"type": "decay", "decay": 0.9},
        training=training,
        evaluation=SCORED,
        lr_schedule={"type": "cosine", "warmup": 2},
        **OWN,
        **changes,
    )


def assert_same_run(one: Path, other: Path):
    assert_identical(saved(one), saved(other))
    assert_identical(lines(one / "log.jsonl"), lines(other / "log.jsonl"))
    assert_identical(lines(one / "evaluations.jsonl"), lines(other / "evaluations.jsonl"))


REGULARIZED = [
    {"type": "step_variation", "measured_batches": 3, "every": 2},
    {"type": "error_propagation", "checkpointing": True, "warmup": 9},
    {"type": "noise_constraint"},
    {"type": "own_method"},
]


def regularized(folder, regularizers=REGULARIZED, **changes):
    """Write a recipe of clips, on which all regularizers work at once.

    There are two backwards a step, an average, and a log window that is half full at each stop.
    """
    config = {
        **CLIPS["model"]["config"],
        "block_out_channels": [8],
        "down_block_types": ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"],
    }
    training = {
        "steps": 4,
        "batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
    }
    return tiny(
        folder,
        **{**CLIPS, "training": {**training, **changes}},
        model__config=config,
        imports=["helpers.own_method"],
        ema={"type": "decay", "decay": 0.9},
        objective={"regularizers": regularizers},
    )


@pytest.fixture(autouse=True)
def own_signals():
    with terminations_fail():
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the run folder of six steps without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    trained(everything(folder))
    return folder / "run"


def test_the_straight_run_has_what_the_comparisons_need(straight):
    """Without this, they would compare nothing."""
    assert [line["step"] for line in lines(straight / "log.jsonl")] == [2, 4, 6]
    assert [line["step"] for line in lines(straight / "evaluations.jsonl")] == [2, 4, 6]
    halfway, end = saved(straight, 3), saved(straight)
    assert halfway["state"]["window"]["rows"][0, -1] == 2  # the two micro-batches of step 3
    assert halfway["state"]["objective"]["regularizers.own_method.mean"] > 0
    assert largest_difference(end["model"], end["ema"]) > 1e-5
    assert largest_difference(halfway["model"], end["model"]) > 1e-4


@pytest.mark.parametrize("name", ["terminate", "interrupt"])
@pytest.mark.parametrize("step", [2, 3])
def test_a_run_stopped_by_a_signal_and_resumed_equals_the_straight_one(
    tmp_path, straight, monkeypatch, name, step
):
    file = everything(tmp_path)
    monkeypatch.setenv("OWN_METHOD", f"{name}:{step}")
    first = trainer(file)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    assert first.run() is False
    assert first.progress.step == step + 1  # the step was finished
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run/checkpoints")) == step + 1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    monkeypatch.delenv("OWN_METHOD")
    second = trainer(file)
    assert second.resume() == step + 1
    assert second.run() is True

    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_run_that_was_killed_after_it_had_logged_and_resumed_equals_the_straight_one(
    tmp_path, straight, monkeypatch, step
):
    """Killed in steps 2, 5 and 6: before the first checkpoint, and with log lines after one."""
    file = everything(tmp_path)
    monkeypatch.setenv("OWN_METHOD", f"die:{step}")
    with pytest.raises(ConnectionError):
        trained(file)
    monkeypatch.delenv("OWN_METHOD")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')

    second = trainer(file)
    assert second.resume() == (3 if step > 2 else 0)
    assert second.run()

    assert_same_run(tmp_path / "run", straight)


def test_the_log_is_cut_when_the_run_resumes_not_when_it_logs_again(
    tmp_path, straight, monkeypatch
):
    file = everything(tmp_path)
    monkeypatch.setenv("OWN_METHOD", "die:4")
    with pytest.raises(ConnectionError):
        trained(file)
    assert [line["step"] for line in lines(tmp_path / "run/log.jsonl")] == [2, 4]

    trainer(file).resume()

    for name in ("log", "evaluations"):
        assert [line["step"] for line in lines(tmp_path / f"run/{name}.jsonl")] == [2]


def test_a_run_whose_steps_are_raised_goes_on_as_if_they_had_always_been_more(tmp_path):
    """This needs a constant rate: a schedule depends on the number of steps."""
    changes = {"ema": {"type": "decay", "decay": 0.9}, "model__config__dropout": 0.2}
    trained(tiny(tmp_path / "raised", training__steps=3, **changes))

    raised = trainer(tiny(tmp_path / "raised", training__steps=6, **changes))
    assert raised.resume() == 3
    assert raised.run()
    trained(tiny(tmp_path / "straight", training__steps=6, **changes))

    assert_identical(saved(tmp_path / "raised/run"), saved(tmp_path / "straight/run"))
    assert_identical(
        lines(tmp_path / "raised/run/log.jsonl"), lines(tmp_path / "straight/run/log.jsonl")
    )


def test_a_finished_run_has_no_steps_left(tmp_path):
    first = trained(tiny(tmp_path, training__steps=1))
    again = trained(tiny(tmp_path, training__steps=1))

    assert again.progress.step == 1
    assert_identical(parameters(again), parameters(first))


@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
def test_accumulated_gradients_equal_the_large_batch(tmp_path, timesteps):
    changes = {
        **OWN,
        **FLOAT64,
        "objective__timesteps": {"type": timesteps},
        "objective__weighting": {"type": "min_snr"},
    }
    runs, logs = [], []
    for micro in (16, 4):
        training = {"steps": 3, "batch_size": 16, "micro_batch_size": micro, "log_every": 1}
        runs.append(trained(tiny(tmp_path / str(micro), training=training, **changes)))
        logs.append(lines(tmp_path / str(micro) / "run/log.jsonl"))

    assert runs[1].num_micro == 4
    assert largest_difference(*(parameters(run) for run in runs)) <= 1e-12
    for large, small in zip(*logs, strict=True):
        assert large["terms"].keys() == small["terms"].keys() == {"error", "own_method"}
        assert_close(small["loss"], large["loss"], absolute=1e-12)
        assert_close(small["grad_norm"], large["grad_norm"], relative=1e-12)
        assert [band["count"] for band in small["bands"]] == [
            band["count"] for band in large["bands"]
        ]


def test_a_step_is_the_optimizer_on_the_mean_error_of_its_batch(tmp_path):
    """One SGD step by hand on the plain epsilon error, with the noise and timesteps of step 0."""
    training = {"steps": 1, "batch_size": 8, "clip_norm": None}
    made = trainer(
        tiny(tmp_path, optimizer={"name": "sgd", "lr": 0.5}, training=training, **FLOAT64)
    )
    before = parameters(made)
    micro = next(made.loader.batches(0))
    draws = Rng(0, 0, range(8))
    x0 = to_unit_range(micro.pixels).double()
    t = made.objective.timesteps(50, draws).t
    eps = made.objective.noise(x0, draws)
    labels = torch.where(draws.uniform("label_dropout") < 0.2, 10, micro.labels)
    x_t = diffuse(x0, eps, made.objective.schedule.level(t))
    output = made.bare.train()(x_t, t, {"class_labels": labels})
    (output - eps).square().mean().backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in made.bare.named_parameters()}
    made.bare.zero_grad()

    assert made.run()

    assert largest_difference(parameters(made), expected) <= 1e-14
    assert largest_difference(before, expected) > 1e-3


def test_the_gradient_is_clipped_to_the_norm_and_logged_as_it_was(tmp_path):
    settings = {"steps": 1, "batch_size": 8, "clip_norm": 1e-3, "log_every": 1}
    made = trainer(
        tiny(tmp_path, optimizer={"name": "sgd", "lr": 1.0}, training=settings, **FLOAT64)
    )
    before = parameters(made)
    made.run()

    squares = [(p - before[name]).square().sum() for name, p in parameters(made).items()]
    change = sum(squares).sqrt().item()
    norm = lines(tmp_path / "run/log.jsonl")[0]["grad_norm"]
    assert norm > 0.1
    assert_close(change, 1e-3, relative=2e-6 / norm + 1e-9)  # torch divides by norm + 1e-6


def test_the_learning_rate_follows_its_schedule_from_step_to_step(tmp_path):
    cosine = {"type": "cosine", "warmup": 2, "final": 0.1}
    trained(tiny(tmp_path, lr_schedule=cosine, optimizer={"name": "adamw", "lr": 0.02}))

    schedule = Cosine(warmup=2, final=0.1)
    assert [line["lr"] for line in lines(tmp_path / "run/log.jsonl")] == [
        0.02 * schedule(step, 6) for step in range(6)
    ]


def test_a_log_line_holds_the_means_since_the_one_before(tmp_path):
    trained(tiny(tmp_path / "each", **OWN, **FLOAT64))
    trained(tiny(tmp_path / "pairs", training__log_every=2, **OWN, **FLOAT64))

    each, pairs = lines(tmp_path / "each/run/log.jsonl"), lines(tmp_path / "pairs/run/log.jsonl")
    assert [line["step"] for line in pairs] == [2, 4, 6]
    assert [line["images"] for line in pairs] == [16, 32, 48]
    for i, line in enumerate(pairs):
        mean = (each[2 * i]["loss"] + each[2 * i + 1]["loss"]) / 2
        assert_close(line["loss"], mean, absolute=1e-14)
        assert_close(sum(line["terms"].values()), line["loss"], absolute=1e-14)
        assert sum(band["count"] for band in line["bands"]) == 16


def test_the_speed_counts_the_images_since_the_line_before_also_in_the_first(tmp_path, monkeypatch):
    """Each step takes one second on the clock of this test."""
    made = trainer(tiny(tmp_path, training={"steps": 6, "batch_size": 8, "log_every": 3}))
    clock = itertools.count()
    monkeypatch.setattr("difftrain.training.trainer.time.perf_counter", lambda: float(next(clock)))
    made.run()

    log = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["wall"] for line in log] == [
        {"seconds": 3.0, "images_per_second": 8.0},
        {"seconds": 6.0, "images_per_second": 8.0},
    ]


def test_the_average_follows_its_decay_from_step_to_step(tmp_path):
    settings = {"steps": 4, "batch_size": 8, "checkpoint_every": 1, "keep_checkpoints": 9}
    made = trainer(
        tiny(tmp_path, training=settings, ema={"type": "decay", "decay": 0.3}, **FLOAT64)
    )
    average, decay = parameters(made), ConstantDecay(0.3)
    made.run()

    for step in range(4):
        kept = decay(step, 8)
        weights = saved(tmp_path / "run", step + 1)
        average = {
            name: kept * average[name] + (1 - kept) * weights["model"][name] for name in average
        }
        assert largest_difference(average, weights["ema"]) <= 1e-14


class Onlooker(Callback):
    """A callback that keeps the weights it gets, and returns the next of its values."""

    every = 1

    def __init__(self, values, protocol=None):
        self.values, self.seen, self.protocol = iter(values), [], protocol

    def __call__(self, denoiser, step, training_seconds):
        assert not denoiser.training
        self.seen.append({name: p.detach().clone() for name, p in denoiser.named_parameters()})
        return next(self.values)


AVERAGED = {"ema": {"type": "decay", "decay": 0.5}}


def called_back(tmp_path, values, **training):
    """Train as many steps as there are values; return the trainer and its callback."""
    training = {"steps": len(values), "batch_size": 8, **training}
    made = trainer(tiny(tmp_path, training=training, **AVERAGED))
    onlooker = Onlooker(values)
    made.callbacks = [onlooker]
    made.resume()
    made.run()
    return made, onlooker


def test_a_callback_gets_the_average_and_training_goes_on_with_the_weights(tmp_path):
    saving = {"checkpoint_every": 1, "keep_checkpoints": 9}
    made, onlooker = called_back(tmp_path / "called", [None] * 3, **saving)
    training = {"steps": 3, "batch_size": 8}
    plain = trained(tiny(tmp_path / "plain", training=training, **AVERAGED))

    for step, seen in enumerate(onlooker.seen, start=1):
        assert_identical(seen, saved(tmp_path / "called/run", step)["ema"])
    assert_identical(parameters(made), parameters(plain))


def test_a_loaded_network_is_in_training_mode_in_every_step_also_after_a_callback(
    pipelines, tmp_path
):
    made, modes = trainer(recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"))), []
    made.bare.model.register_forward_pre_hook(
        lambda model, _: modes.append({module.training for module in model.modules()})
    )
    made.callbacks = [Onlooker([None] * 2)]
    made.run()

    assert modes == [{True}] * 2


def test_a_step_takes_no_walk_through_the_network(tmp_path, monkeypatch):
    """A LoRA makes thousands of modules: each walk takes milliseconds of a step."""
    made = trainer(tiny(tmp_path))
    for name in ("train", "named_modules"):

        def walk(*given, name=name, **more):
            pytest.fail(f"{name} in a step")

        monkeypatch.setattr(made.model, name, walk)

    made.step(made.loader.batches(0))


@pytest.mark.parametrize(
    ("values", "left", "best"),
    [
        ([3.0, 1.0, 2.0, 2.0], [2, 4], (2, 1.0)),
        ([3.0, 2.0, 1.0, 1.0], [3, 4], (3, 1.0)),
        ([math.nan, 2.0, math.nan, 3.0], [2, 4], (2, 2.0)),
        ([math.nan] * 4, [4], (None, None)),
        ([None] * 4, [4], (None, None)),
    ],
)
def test_the_best_checkpoint_is_saved_and_outlives_the_rotation(tmp_path, values, left, best):
    made, _ = called_back(tmp_path, values, keep_checkpoints=1)

    assert [checkpoint.step_of(path) for path in checkpoint.whole(made.checkpoints)] == left
    assert (made.progress.best_step, made.progress.best_value) == best
    assert saved(tmp_path / "run")["trainer"] == {
        "step": 4,
        "best_step": best[0],
        "best_value": best[1],
        "best_protocol": None,
    }


def test_a_best_value_of_another_protocol_is_no_rival(tmp_path):
    made = trainer(tiny(tmp_path, training={"steps": 3, "batch_size": 8}))
    made.callbacks = [Onlooker([5.0, 6.0, 4.0], protocol="new")]
    made.progress = Progress(0, best_step=7, best_value=1.0, best_protocol="old")
    made.run()

    assert made.progress == Progress(3, best_step=3, best_value=4.0, best_protocol="new")


def test_the_best_value_so_far_is_known_after_a_stop(tmp_path):
    called_back(tmp_path, [1.0, 2.0])

    made, _ = called_back(tmp_path, [3.0, 3.0, 1.5, 3.0], keep_checkpoints=1)

    assert (made.progress.step, made.progress.best_step, made.progress.best_value) == (4, 1, 1.0)
    assert [checkpoint.step_of(path) for path in checkpoint.whole(made.checkpoints)] == [1, 4]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpoints_stand_at_their_steps_and_at_the_last(tmp_path, every):
    saving = {"checkpoint_every": every, "keep_checkpoints": 2}
    trained(tiny(tmp_path, training={"steps": 4, "batch_size": 2, **saving}))

    expected = {1: [3, 4], 2: [2, 4], 3: [3, 4]}[every]
    found = checkpoint.whole(tmp_path / "run/checkpoints")
    assert [checkpoint.step_of(path) for path in found] == expected


@pytest.mark.parametrize(
    ("action", "name"), [("nan", "own_method and gradient norm"), ("steep", "gradient norm")]
)
def test_what_is_not_finite_stops_the_run_before_the_update(
    tmp_path, straight, monkeypatch, action, name
):
    """It comes in step 4: the state after step 3 is saved, from which the run goes on."""
    monkeypatch.setenv("OWN_METHOD", f"{action}:3")
    file = everything(tmp_path, training__checkpoint_every=100)

    with pytest.raises(
        NotFinite,
        match=rf"step 4: {name} (is|are) not finite\. Training stopped .*step-0000003.*Lower",
    ):
        trained(file)

    assert_identical(saved(tmp_path / "run"), saved(straight, 3))
    monkeypatch.delenv("OWN_METHOD")
    trained(file)
    assert_same_run(tmp_path / "run", straight)


def test_every_term_that_is_not_finite_is_named(tmp_path, monkeypatch):
    made = trainer(tiny(tmp_path, **OWN))
    with torch.no_grad():
        next(made.bare.parameters()).fill_(math.nan)

    with pytest.raises(
        NotFinite, match="step 1: error and own_method and gradient norm are not finite"
    ):
        made.run()


def test_a_term_that_is_not_finite_leaves_the_weights_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_METHOD", "nan:0")
    made = trainer(tiny(tmp_path, ema={"type": "decay"}, **OWN))
    before = parameters(made)

    with pytest.raises(NotFinite):
        made.run()

    assert_identical(parameters(made), before)
    assert_identical(made.average.state_dict(), before)
    assert all(p.grad is None for p in made.bare.parameters())
    assert checkpoint.latest(tmp_path / "run/checkpoints").name == "step-0000000"


def test_a_signal_in_the_last_step_stops_too(tmp_path, monkeypatch):
    """The work after the last step may take long. The next run does it."""
    monkeypatch.setenv("OWN_METHOD", "terminate:1")
    made = trainer(tiny(tmp_path, training={"steps": 2, "batch_size": 8}, **OWN))

    assert made.run() is False
    assert made.progress.step == 2


def test_a_second_interrupt_stops_at_once_unless_it_is_the_first_one_sent_twice(monkeypatch):
    clock = iter([10.0, 10.2, 13.0])
    monkeypatch.setattr("difftrain.training.signals.time.monotonic", lambda: next(clock))
    stop = StopRequest()
    with stop.listening():
        try:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # the terminal's, then the launcher's
        except KeyboardInterrupt:
            pytest.fail("one interrupt that came twice counted as two")
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "expected"),
    [(16, None, 1, 16), (16, None, 2, 8), (16, 4, 2, 4), (12, 3, 4, 3), (2, None, 2, 1)],
)
def test_the_micro_batch_is_a_process_s_whole_share_unless_it_is_written(
    batch_size, micro, processes, expected
):
    assert (
        Training(steps=1, batch_size=batch_size, micro_batch_size=micro).micro_batch_of(processes)
        == expected
    )


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "said"),
    [
        (
            16,
            3,
            1,
            "micro_batch_size: 3 samples on each of 1 process.* do not divide batch_size 16. Write "
            "one of 1, 2, 4, 8, 16",
        ),
        (
            12,
            4,
            2,
            "micro_batch_size: 4 samples on each of 2 process.* do not divide batch_size 12. Write "
            "one of 1, 2, 3, 6",
        ),
        (16, 32, 1, "micro_batch_size: .*Write one of 1, 2, 4, 8, 16"),
        (3, None, 2, "batch_size: 3 cannot be divided over 2 processes. Write a multiple of 2"),
        (1, None, 2, "batch_size: 1 cannot be divided over 2 processes"),
    ],
)
def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do(
    batch_size, micro, processes, said
):
    with pytest.raises(InputError, match=rf"^training\.{said}"):
        Training(steps=1, batch_size=batch_size, micro_batch_size=micro).micro_batch_of(processes)


def test_bfloat16_trains_float32_weights_with_a_finite_loss(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        made = trained(
            tiny(
                tmp_path,
                training={"steps": 3, "batch_size": 8, "log_every": 1},
                ema={"type": "decay"},
            )
        )
        assert made.accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()

    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run/log.jsonl"))
    assert (
        {p.dtype for p in made.bare.parameters()}
        == {value.dtype for value in made.average.state_dict().values()}
        == {torch.float32}
    )


def test_attention_and_a_learned_average_of_both_resume_too(tmp_path):
    """The key bias of attention has a gradient of rounding alone, which resumes too."""
    config = {
        **UNET,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    changes = {"model__config": config, "ema": {"type": "half_life", "images": 100.0}}
    trained(tiny(tmp_path / "straight", training__steps=4, **changes))
    trained(tiny(tmp_path / "resumed", training__steps=2, **changes))
    trained(tiny(tmp_path / "resumed", training__steps=4, **changes))

    assert_identical(saved(tmp_path / "resumed/run"), saved(tmp_path / "straight/run"))


@pytest.fixture(scope="module")
def straight_with_regularizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regularized")
    trained(regularized(folder))
    return folder / "run"


def objective_state(run, step=None):
    """Read the regularizers' state from a checkpoint."""
    state = saved(run, step)["state"]["objective"]
    return {name.removeprefix("regularizers."): value for name, value in state.items()}


def test_the_regularized_run_has_what_the_comparisons_need(straight_with_regularizers):
    first = lines(straight_with_regularizers / "log.jsonl")[0]
    end = objective_state(straight_with_regularizers)
    halfway = objective_state(straight_with_regularizers, 2)

    terms = {"step_variation", "error_propagation", "noise_constraint", "own_method"}
    measures = {"step_variation.mean_variation", "error_propagation.u_statistic"}
    assert first["terms"].keys() == terms | {"error"}
    assert first["measures"].keys() == measures
    assert end["step_variation.num_updates"].item() == 4  # steps 0 and 2, two backwards each
    for name in ("step_variation.h", "step_variation.mean_variation", "own_method.mean"):
        assert end[name].item() > 0
    name = "step_variation.mean_variation"
    assert halfway[name] != end[name]


def test_a_stopped_and_resumed_run_with_every_regularizer_equals_the_straight_one(
    tmp_path, straight_with_regularizers, monkeypatch
):
    """Stopped after its first step, amid the measured batches and the warm-up."""
    file = regularized(tmp_path)
    monkeypatch.setenv("OWN_METHOD", "terminate:0")
    assert trainer(file).run() is False
    monkeypatch.delenv("OWN_METHOD")

    second = trainer(file)
    assert second.resume() == 1
    assert second.run()

    assert_identical(saved(tmp_path / "run"), saved(straight_with_regularizers))
    assert_identical(
        lines(tmp_path / "run/log.jsonl"), lines(straight_with_regularizers / "log.jsonl")
    )


def test_a_regularizer_that_is_added_on_resume_starts_fresh_and_the_others_go_on(tmp_path):
    before, added = [{"type": "own_method"}], {"type": "step_variation", "step_size": 0.1}
    trained(regularized(tmp_path, before, steps=1))
    old = objective_state(tmp_path / "run")

    made = trainer(regularized(tmp_path, [added, *before], steps=2))
    assert made.resume() == 1
    assert_identical(made.objective.regularizers["own_method"].mean, old["own_method.mean"])
    assert made.objective.regularizers["step_variation"].num_updates.item() == 0
    assert made.run()

    assert objective_state(tmp_path / "run")["step_variation.num_updates"].item() == 2
    assert [line["terms"].keys() for line in lines(tmp_path / "run/log.jsonl")][-1] == {
        "error",
        "own_method",
        "step_variation",
    }


def test_a_regularizer_that_is_removed_on_resume_is_forgotten_and_the_others_go_on(tmp_path):
    kept, removed = {"type": "own_method"}, {"type": "step_variation", "step_size": 0.1}
    trained(regularized(tmp_path, [removed, kept], steps=1))
    old = objective_state(tmp_path / "run")

    made = trainer(regularized(tmp_path, [kept], steps=2))
    assert made.resume() == 1
    assert_identical(made.objective.regularizers["own_method"].mean, old["own_method.mean"])
    assert made.run()

    assert objective_state(tmp_path / "run").keys() == {"own_method.mean"}
    assert lines(tmp_path / "run/log.jsonl")[-1]["terms"].keys() == {"error", "own_method"}


def test_a_mean_that_has_met_what_is_not_finite_is_saved_as_it_was(
    tmp_path, straight_with_regularizers, monkeypatch
):
    monkeypatch.setenv("OWN_METHOD", "nan:2")
    with pytest.raises(NotFinite, match="step 3: own_method and gradient norm are not finite"):
        trained(regularized(tmp_path))

    assert_identical(saved(tmp_path / "run"), saved(straight_with_regularizers, 2))


ANOTHER_LEVEL = '''
"""The estimate of the same image one level below should say the same."""

import torch

from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.schedule import diffuse
from difftrain.objective.slots import REGULARIZERS


@REGULARIZERS.register("another_level")
class AnotherLevel(WeightedTerm):
    """mean |x0_hat(t - 1) - x0_hat(t)|^2 of the first half of the batch."""

    def forward(self, p):
        rows = torch.arange(len(p.t) // 2)
        t = (p.t[rows] - 1).clamp(min=0)
        x = diffuse(p.batch.x0[rows], p.eps[rows], p.schedule.level(t))
        below = p.predict(x, t, rows).x0
        p.record("distance", (below - p.estimate.x0[rows]).abs().mean())
        return (below - p.estimate.x0[rows].detach()).square().mean()
'''


def test_a_regularizer_of_ones_own_in_one_file_beside_the_recipe_trains_and_is_logged(
    tmp_path, monkeypatch
):
    """It runs through `imports:` and the command, and evaluates the network on some rows again."""
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "another_level.py").write_text(ANOTHER_LEVEL)
    file = tiny(
        tmp_path,
        imports=["another_level"],
        objective={"regularizers": [{"type": "another_level", "weight": 0.5}]},
        training={"steps": 2, "batch_size": 4, "log_every": 1, "num_sampled": 2},
    )
    try:
        command("check", file)
        command("train", file)
    finally:
        REGULARIZERS.constructors.pop("another_level", None)
        sys.modules.pop("another_level", None)

    for line in lines(tmp_path / "run/log.jsonl"):
        assert line["terms"].keys() == {"error", "another_level"}
        assert_close(
            line["terms"]["error"] + line["terms"]["another_level"], line["loss"], relative=1e-6
        )
        assert line["terms"]["another_level"] > 0
        assert line["measures"]["another_level.distance"] > 0
    assert "another_level" in (tmp_path / "run/recipe.yaml").read_text()
