"""What is done with the averaged weights during training: the same samples each time, their grid, their score."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.runs import lines, tiny, trainer

from difftrain.evaluation.sources import GeneratedImages
from difftrain.generation.pictures import contact_sheet, grid, save_grid
from difftrain.training.callbacks import generated_images

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
    """A trainer with a sample grid and an in-loop evaluation, and its generator: five of six samples, in blocks of four."""
    evaluation = {**SCORED, "in_loop": {**SCORED["in_loop"], "select": "frechet_distance"}}
    return trainer(
        tiny(
            tmp_path_factory.mktemp("visits"),
            evaluation=evaluation,
            training__sample_every=1,
            training__num_sampled=5,
        )
    )


@pytest.fixture
def generator(made):
    return made.visits[0].generator


def test_blocks_are_those_of_their_indices_with_their_labels(made, generator):
    source = GeneratedImages(generator, made.bare, (1, 8, 8), 6, CPU)
    first, second = source.blocks([[0, 1, 2, 3], [4, 5]])

    assert (len(source), source.block_size, source.has_labels) == (6, 4, True)
    assert [first.labels.tolist(), second.labels.tolist()] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(second.images, generator(made.bare, [4, 5], CPU))


def test_other_weights_or_another_sampler_are_other_images(made, generator):
    def identity():
        return GeneratedImages(generator, made.bare, (1, 8, 8), 6, CPU).identity()

    before = identity()
    assert identity() == before
    parameter = next(made.bare.parameters())
    with torch.no_grad():
        parameter[(0,) * parameter.ndim] += 1e-6
    assert identity() != before
    assert (
        GeneratedImages(generator.with_seed(5), made.bare, (1, 8, 8), 6, CPU).identity()["seed"]
        == 5
    )


def test_images_are_the_blocks_in_order(made, generator):
    images = generated_images(generator, made.bare, 6, CPU)

    expected = torch.cat(
        [generator(made.bare, [0, 1, 2, 3], CPU), generator(made.bare, [4, 5], CPU)]
    )
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected)
    assert torch.equal(generated_images(generator, made.bare, 4, CPU), expected[:4])


@pytest.mark.parametrize(
    ("num", "num_classes", "columns"),
    [(20, 10, 10), (5, 10, 5), (9, None, 3), (10, None, 4), (30, 1000, 6)],
)
def test_a_grid_has_a_column_a_class_where_that_fits_and_is_about_square_elsewhere(
    tmp_path, num, num_classes, columns
):
    images = torch.arange(num, dtype=torch.uint8)[:, None, None, None].expand(num, 1, 2, 2)

    save_grid(images, tmp_path / "new/grid.png", num_classes)

    assert np.array_equal(
        np.asarray(PIL.Image.open(tmp_path / "new/grid.png")), grid(images, columns)[0]
    )


def test_clips_are_shown_as_a_contact_sheet_whatever_their_classes(tmp_path):
    clips = torch.arange(8, dtype=torch.uint8)[:, None, None, None, None].expand(8, 3, 4, 5, 5)

    save_grid(clips, tmp_path / "sheet.png", num_classes=10)

    assert np.array_equal(
        np.asarray(PIL.Image.open(tmp_path / "sheet.png")), contact_sheet(clips).permute(1, 2, 0)
    )


def test_the_same_weights_show_the_same_samples_at_every_step(made):
    show = made.visits[0]
    assert show(made.bare.eval(), 1, 0.0) is None
    show(made.bare, 2, 0.0)

    first, second = (
        (made.folder / f"samples/step-000000{step}.png").read_bytes() for step in (1, 2)
    )
    assert first == second


def test_an_evaluation_is_recorded_with_its_protocol_and_answers_with_the_selected_score(made):
    value = made.visits[1](made.bare.eval(), 2, 10.0)

    (record,) = [
        json.loads(line) for line in (made.folder / "evaluations.jsonl").read_text().splitlines()
    ]
    assert (record["step"], record["num_samples"], record["weights"]) == (2, 6, "model")
    assert record["scores"]["frechet_distance"]["value"] == record["selected_by"] == value
    assert record["protocol"]
    assert record["wall"]["share"] == record["wall"]["seconds"] / 10


def test_an_evaluation_without_a_selected_score_picks_nothing(tmp_path):
    made = trainer(tiny(tmp_path, evaluation=SCORED, ema={"type": "decay"}))

    assert made.visits[0](made.bare.eval(), 2, 10.0) is None
    assert lines(made.folder / "evaluations.jsonl")[0]["weights"] == "ema"
