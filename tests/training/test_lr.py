"""Learning-rate schedules at their ends, in their middle, and while they warm up."""

import math

import pytest
from helpers.support import assert_close

from difftrain.training.lr import LEARNING_RATES, Constant, Cosine, Linear, remarks

SCHEDULES = sorted(LEARNING_RATES.constructors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_whole_rate(name):
    assert LEARNING_RATES.constructors[name]()(0, 100) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_warm_up_rises_by_equal_parts_to_the_whole_rate(name):
    schedule = LEARNING_RATES.constructors[name](warmup=4)

    assert_close(
        [schedule(step, 100) for step in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], absolute=1e-15
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_stays_in_it(name):
    schedule = LEARNING_RATES.constructors[name](warmup=10)

    assert_close([schedule(step, 3) for step in range(3)], [0.1, 0.2, 0.3], absolute=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_has_a_rate(name):
    assert LEARNING_RATES.constructors[name]()(0, 1) == 1.0


@pytest.mark.parametrize(
    "schedule", [Linear(warmup=7, final=0.1), Cosine(warmup=7, final=0.1), Linear(), Cosine()]
)
def test_the_last_step_has_the_final_rate_and_later_ones_keep_it(schedule):
    for step in (99, 100, 1000):
        assert_close(schedule(step, 100), schedule.final, absolute=1e-15)


def test_constant_does_not_end():
    assert Constant(warmup=3)(10**6, 100) == 1.0


def test_the_straight_line_and_the_half_cosine_are_half_way_in_the_middle():
    """101 steps: 0 to 100, with 20 of warm-up the middle is step 60."""
    for schedule in (Linear(warmup=20, final=0.2), Cosine(warmup=20, final=0.2)):
        assert_close(schedule(60, 101), 0.6, absolute=1e-15)
    assert_close(Cosine()(25, 101), 0.5 * (1 + math.cos(math.pi / 4)), absolute=1e-15)
    assert_close(Linear()(25, 101), 0.75, absolute=1e-15)


def test_a_warmup_longer_than_the_run_and_a_last_rate_of_0_are_told():
    (told,) = remarks(Constant(warmup=400), 100)
    assert told.startswith("warmup: 400 steps are more than the 100 of the run")
    assert "25 % of its peak" in told
    for schedule in (Cosine(), Linear()):
        (told,) = remarks(schedule, 100)
        assert told.startswith("the learning rate of the last step is 0")
    for schedule in (Cosine(final=0.01), Linear(final=0.1), Constant(), Constant(warmup=100)):
        assert remarks(schedule, 100) == []
    assert remarks(Cosine(), 1) == []
