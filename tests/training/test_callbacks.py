"""Callbacks: the same samples at each call, their grid, their scores, own callbacks."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from helpers.runs import lines, tiny, trained, trainer

from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, PositiveInt
from difftrain.evaluation.sources import GeneratedSamples
from difftrain.generation.generator import generate
from difftrain.training.callbacks import CALLBACKS, Callback
from difftrain.training.scores import InLoopEvaluation

CPU = torch.device("cpu")
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a trainer with a grid of five samples and an in-loop evaluation of six."""
    evaluation = {**SCORED, "in_loop": {**SCORED["in_loop"], "select": "frechet_distance"}}
    sampled = {"training__sample_every": 1, "training__num_sampled": 5}
    return trainer(tiny(tmp_path_factory.mktemp("callbacks"), evaluation=evaluation, **sampled))


@pytest.fixture
def generator(made):
    return made.callbacks[0].generator


def test_blocks_are_those_of_their_indices_with_their_labels(made, generator):
    source = GeneratedSamples(generator, made.bare, (1, 8, 8), 6, CPU)
    first, second = source.blocks([[0, 1, 2, 3], [4, 5]])

    assert (len(source), source.block_size, source.has_labels) == (6, 4, True)
    assert [first.labels.tolist(), second.labels.tolist()] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(second.samples, generator(made.bare, [4, 5], CPU))


def test_other_weights_or_another_sampler_are_other_images(made, generator):
    def identity():
        return GeneratedSamples(generator, made.bare, (1, 8, 8), 6, CPU).identity()

    before = identity()
    assert identity() == before
    parameter = next(made.bare.parameters())
    with torch.no_grad():
        parameter[(0,) * parameter.ndim] += 1e-6
    assert identity() != before
    seeded = GeneratedSamples(generator.with_seed(5), made.bare, (1, 8, 8), 6, CPU)
    assert seeded.identity()["seed"] == 5


def test_images_are_the_blocks_in_order(made, generator):
    images = generate(generator, made.bare, 6, CPU)

    blocks = [generator(made.bare, indices, CPU) for indices in ([0, 1, 2, 3], [4, 5])]
    expected = torch.cat(blocks)
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected)
    assert torch.equal(generate(generator, made.bare, 4, CPU), expected[:4])


def test_the_same_weights_show_the_same_samples_at_every_step(made):
    show = made.callbacks[0]
    assert show(made.bare.eval(), 1, 0.0) is None
    show(made.bare, 2, 0.0)

    first, second = (
        (made.folder / f"samples/step-000000{step}.png").read_bytes() for step in (1, 2)
    )
    assert first == second


def test_an_evaluation_is_recorded_with_its_protocol_and_answers_with_the_selected_score(made):
    value = made.callbacks[1](made.bare.eval(), 2, 10.0)

    (line,) = (made.folder / "evaluations.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["num_samples"], record["weights"]) == (2, 6, "model")
    assert record["scores"]["frechet_distance"]["value"] == record["selected_by"] == value
    assert record["protocol"]
    seconds = record["wall"]["seconds"]
    assert record["wall"]["share"] == pytest.approx(seconds / (seconds + 10))


def test_an_evaluation_without_a_selected_score_picks_nothing(tmp_path):
    made = trainer(tiny(tmp_path, evaluation=SCORED, ema={"type": "decay"}))

    assert made.callbacks[0](made.bare.eval(), 2, 10.0) is None
    assert lines(made.folder / "evaluations.jsonl")[0]["weights"] == "ema"


@pytest.mark.parametrize("raises", [InputError("no samples"), ValueError("broken")])
def test_a_selected_score_that_fails_ends_the_run_with_its_reason(tmp_path, monkeypatch, raises):
    evaluation = {**SCORED, "in_loop": {**SCORED["in_loop"], "select": "frechet_distance"}}
    made = trainer(tiny(tmp_path, evaluation=evaluation))
    (callback,) = (one for one in made.callbacks if isinstance(one, InLoopEvaluation))
    (metric,) = callback.scorer.evaluator.metrics

    def fail(*given: Any, **more: Any) -> Any:
        raise raises

    monkeypatch.setattr(type(metric), "__call__", fail)
    with pytest.raises(
        InputError, match=r"evaluation.in_loop.select: frechet_distance failed: .*(no samples|bro)"
    ):
        callback(made.bare.eval(), 2, 10.0)


# Own callbacks


class Largest(Callback):
    """Records the largest weight.

    Args:
        folder: The run folder.
        every: Steps between two calls.
    """

    def __init__(self, folder: Annotated[Path, GIVEN], every: PositiveInt = 2):
        self.folder = folder
        self.every = every

    def __call__(self, denoiser: torch.nn.Module, step: int, training_seconds: float) -> float:
        """Append the largest weight to a file, and return it."""
        largest = max(p.abs().max().item() for p in denoiser.parameters())
        with (self.folder / "largest.txt").open("a") as file:
            file.write(f"{step} {largest}\n")
        return largest


def test_a_recipe_can_name_an_own_callback(tmp_path):
    CALLBACKS.register("largest")(Largest)
    try:
        made = trained(tiny(tmp_path, training__steps=5, callbacks=[{"type": "largest"}]))
    finally:
        del CALLBACKS.constructors["largest"]

    rows = [line.split() for line in (tmp_path / "run/largest.txt").read_text().splitlines()]
    assert [int(step) for step, _ in rows] == [2, 4, 5]
    values = {int(step): float(value) for step, value in rows}
    assert made.progress.best_step == min(values, key=values.__getitem__)
