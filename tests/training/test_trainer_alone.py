"""The trainer without a recipe: an own network, a plain torch data set, an optimizer, a folder."""

import json
from typing import Any

import pytest
import torch
from helpers.places import PROGRAMS
from helpers.points import SCHEDULE, PointMLP, Points, point_trainer
from helpers.runs import (
    assert_identical,
    largest_difference,
    lines,
    parameters,
    saved,
)
from helpers.several import run_program
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.schedule import diffuse
from difftrain.training.batches import TorchItems
from difftrain.training.callbacks import Callback
from difftrain.training.checkpoint import latest, load_weights
from difftrain.training.ema import ConstantDecay
from difftrain.training.lr import Cosine


def test_a_step_is_the_optimizer_on_the_weighted_error_of_its_batch(tmp_path):
    """By hand: w = 1 / (1 + SNR) on the epsilon error, and AdamW on the mean over the batch."""
    made, other = point_trainer(tmp_path / "a", steps=1), point_trainer(tmp_path / "b")
    draws = Rng(0, 0, range(16))
    micro_batches = other.loader.batches(0)
    x0 = torch.cat([next(micro_batches).values for _ in range(4)])
    t = made.objective.timesteps(50, draws).t
    eps, level = made.objective.noise(x0, draws), SCHEDULE.level(t)
    output = other.bare(diffuse(x0, eps, level), t, {})
    error = (output - eps).square().flatten(1).mean(1)
    loss = (error / (1 + level.snr)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters, 1.0)
    other.optimizer.step()

    assert made.train()

    assert largest_difference(parameters(made), parameters(other)) <= 1e-12
    (record,) = lines(tmp_path / "a/log.jsonl")
    assert_close(record["loss"], loss, relative=1e-12)


def test_training_lowers_the_loss_and_the_log_tells_it(tmp_path):
    made = point_trainer(tmp_path, steps=200, micro_batch_size=16, log_every=20)

    assert made.train()

    log = lines(tmp_path / "log.jsonl")
    assert [record["step"] for record in log] == list(range(20, 201, 20))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[0].keys() >= {"loss", "terms", "measures", "lr", "grad_norm", "images", "bands"}
    assert [record["images"] for record in log] == [16 * record["step"] for record in log]
    assert set(made.seconds) == {"training", "callbacks"}
    wall = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["wall"]
    assert wall.keys() == {"seconds", "images_per_second"}


def test_items_may_be_tensors_or_tuples_of_one_tensor(tmp_path):
    runs = [point_trainer(tmp_path / kind, kind) for kind in ("tensor", "tuple")]
    for run in runs:
        assert run.train()

    assert_identical(parameters(runs[0]), parameters(runs[1]))
    assert all(cond == {} for cond in runs[0].bare.seen)


def test_labels_reach_the_network_as_class_labels(tmp_path):
    made = point_trainer(tmp_path, "pair", steps=1, micro_batch_size=16)
    micro = next(made.loader.batches(0))
    assert made.train()

    (cond,) = made.bare.seen
    assert cond.keys() == {"class_labels"}
    assert torch.equal(cond["class_labels"], micro.labels)
    for x0, label in zip(micro.values, cond["class_labels"], strict=True):
        (row,) = torch.where((Points().points == x0).all(1))
        assert label.item() == row.item() % 3


def test_mappings_bring_conditioning_tensors_by_name(tmp_path):
    made = point_trainer(tmp_path, "mapping", steps=1, micro_batch_size=16)
    micro = next(made.loader.batches(0))
    assert made.train()

    (cond,) = made.bare.seen
    assert cond.keys() == {"class_labels", "shift"}
    assert torch.equal(cond["shift"], 0.1 * micro.values)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("text", "item 0 of list is a str of length 4"),
        ((torch.zeros(2), 0, 1), "item 0 of list is a tuple of length 3"),
        ({"image": torch.zeros(2)}, "item 0 of list is a dict of length 1 with the keys image"),
        (3.0, "item 0 of list is a float"),
    ],
)
def test_items_of_another_form_are_named(item, said):
    with pytest.raises(InputError) as error:
        TorchItems([item])

    assert said in str(error.value)
    assert 'Expected a tensor x0, (x0,), (x0, label), or a mapping with "x0"' in str(error.value)


def test_integers_and_an_empty_data_set_are_refused():
    with pytest.raises(InputError, match=r"item 0 has values of type torch.int64"):
        TorchItems([torch.tensor([1, 2])])
    with pytest.raises(InputError, match="the data set is empty"):
        TorchItems([])


def test_items_of_two_shapes_are_refused_in_training(tmp_path):
    made = point_trainer(tmp_path)
    made.loader.dataset.dataset.points = [torch.zeros(2), *[torch.zeros(3)] * 39]

    with pytest.raises(InputError, match=r"has the shape \(3,\), but the item_shape .* is \(2,\)"):
        made.train()


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, kind):
    """The first half logs its last step, so that the window of step 4 is shorter there."""
    averaged = {"ema": ConstantDecay(0.9)}
    straight = point_trainer(tmp_path / "straight", kind, **averaged)
    assert straight.train()
    assert point_trainer(tmp_path / "resumed", kind, steps=3, **averaged).train()

    resumed = point_trainer(tmp_path / "resumed", kind, **averaged)
    assert resumed.resume() == 3
    assert resumed.run()

    assert_identical(saved(tmp_path / "resumed"), saved(tmp_path / "straight"))
    assert_identical(parameters(resumed), parameters(straight))
    log, whole_log = (lines(tmp_path / name / "log.jsonl") for name in ("resumed", "straight"))
    assert [record["step"] for record in log] == [2, 3, 4, 6]
    assert_identical([log[0], log[3]], [whole_log[0], whole_log[2]])


def test_the_average_and_the_learning_rate_follow_the_step(tmp_path):
    decay, schedule = ConstantDecay(0.5), Cosine(warmup=2)
    saving = {"checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1}
    made = point_trainer(tmp_path, ema=decay, learning_rate=schedule, **saving)
    average = parameters(made)
    assert made.train()

    for step in range(6):
        kept, weights = decay(step, 16), saved(tmp_path, step + 1)
        for name, value in weights["model"].items():
            average[name] = kept * average[name] + (1 - kept) * value
        assert largest_difference(average, weights["ema"]) <= 1e-14
    rates = [record["lr"] for record in lines(tmp_path / "log.jsonl")]
    assert rates == [1e-2 * schedule(step, 6) for step in range(6)]
    loaded = PointMLP().double()
    assert load_weights(loaded, latest(made.checkpoints), averaged=True) == "ema"
    assert_identical({**loaded.state_dict()}, saved(tmp_path)["ema"])


class Picks(Callback):
    """Returns the next of its values, and keeps whether the network was in eval mode."""

    every = 2

    def __init__(self, *values: float):
        self.values, self.steps, self.modes = iter(values), [], set()

    def __call__(self, denoiser: torch.nn.Module, step: int, training_seconds: float) -> float:
        self.steps.append(step)
        self.modes.add(denoiser.training)
        return next(self.values)


def test_a_callback_picks_the_best_checkpoint(tmp_path):
    picks = Picks(2.0, 1.0, 3.0)
    made = point_trainer(tmp_path, callbacks=[picks], keep_checkpoints=1)
    assert made.train()

    assert picks.steps == [2, 4, 6]
    assert picks.modes == {False}
    assert (made.progress.best_step, made.progress.best_value) == (4, 1.0)
    assert saved(tmp_path)["trainer"]["best_step"] == 4
    assert (tmp_path / "checkpoints/step-0000004").is_dir()


class Own:
    """Batches of one's own: anything that yields micro-batches from a step on."""

    def __init__(self, loader: Any):
        self.loader, self.started = loader, []

    def batches(self, start_step: int) -> Any:
        self.started.append(start_step)
        return self.loader.batches(start_step)


def test_a_loader_of_ones_own_takes_the_place_of_the_data_set(tmp_path):
    plain = point_trainer(tmp_path / "plain")
    assert plain.train()
    made = point_trainer(tmp_path / "own")
    made.loader = own = Own(made.loader)

    assert made.train()

    assert own.started == [0]
    assert_identical(parameters(made), parameters(plain))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    assert point_trainer(tmp_path, "tensor", steps=1).train()

    with pytest.raises(InputError, match="step-0000001 cannot be resumed: "):
        point_trainer(tmp_path, "pair").train()


@pytest.mark.distributed
def test_two_processes_train_what_one_does(tmp_path):
    """In halves each; one process resumes what the two saved, too."""
    run_program(PROGRAMS / "points.py", tmp_path / "two", "2", num=2)
    for steps in (3, 6):
        half = {"steps": steps, "ema": ConstantDecay(0.5)}
        assert point_trainer(tmp_path / "one", "pair", **half).train()

    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert largest_difference(one["model"], two["model"]) <= 1e-12
    assert largest_difference(one["ema"], two["ema"]) <= 1e-12
    logs = [lines(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"]
        assert_close(b["loss"], a["loss"], relative=1e-12)
        assert_close(b["grad_norm"], a["grad_norm"], relative=1e-10)

    ema = {"ema": ConstantDecay(0.5), "steps": 8}
    resumed = [point_trainer(tmp_path / name, "pair", **ema) for name in ("one", "two")]
    for trainer in resumed:
        assert trainer.train()
    assert largest_difference(*(parameters(trainer) for trainer in resumed)) <= 1e-12
