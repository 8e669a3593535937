"""The regularizer of recipes/own_regularizer.py, which shows how to write one in a file."""

import importlib.util

import pytest
import torch
from helpers.places import ROOT
from helpers.support import assert_close, images, rng, term_alone

from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.types import Batch

BATCH = Batch(images(4))


@pytest.fixture
def mean_shift():
    """The part of that file; the registry is as before afterwards."""
    file = ROOT / "recipes" / "own_regularizer.py"
    before = REGULARIZERS.constructors.pop("mean_shift", None)
    spec = importlib.util.spec_from_file_location("own_regularizer", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield REGULARIZERS.parse({"type": "mean_shift", "weight": 0.5}, "regularizer").build()
    del REGULARIZERS.constructors["mean_shift"]
    if before is not None:
        REGULARIZERS.constructors["mean_shift"] = before


def losses_of(regularizer, shift):
    objective = term_alone(regularizer, "sample", NoiseSchedule.linear())
    return objective(lambda x, t, cond: BATCH.x0 + shift, BATCH, rng())


def test_a_shift_of_the_channels_costs_its_square(mean_shift):
    losses = losses_of(mean_shift, torch.tensor([0.3, -0.4])[:, None, None])

    assert_close(losses.terms["mean_shift"], 0.5 * (0.3**2 + 0.4**2), relative=1e-7)
    assert_close(losses.measures["mean_shift.largest"], 0.4, relative=1e-7)


def test_an_estimate_with_the_right_brightness_costs_nothing(mean_shift):
    pattern = torch.tensor([[1.0, -1.0, 0.0]] * 3).double()

    assert losses_of(mean_shift, pattern).total.item() < 1e-30
