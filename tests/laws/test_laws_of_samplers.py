"""Samples of a perfect network have the data's mean and spread, or the sampler is refused.

The data are independent Gaussian numbers, whose perfect network is known. Registering a sampler
adds it.
"""

import dataclasses
import functools
from itertools import pairwise

import pytest
import torch
from helpers.generation import CPU, DATA, Optimal, generated, generator
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.generation import sampler_checks
from difftrain.generation.samplers import DDIM, SAMPLERS, DiffusersSampler, DPMSolver, Euler, UniPC
from difftrain.objective.parameterization import estimate
from difftrain.objective.schedule import NoiseSchedule

T = 100
SCHEDULES = {
    "cosine": NoiseSchedule.cosine(T),
    "sigmoid": NoiseSchedule.sigmoid(T),
    "zero_terminal": NoiseSchedule.scaled_linear(T, zero_terminal_snr=True),
    "flow": NoiseSchedule.flow(T),
    "shifted flow": NoiseSchedule.flow(T, shift=3.0),
}
STEPS = (1, 2, 5, 20, 37, T // 2, T)
SPACINGS = ("trailing", "leading", "linspace")
# How far mean and standard deviation may be off, of data with a standard deviation of 0.25. The
# stochastic samplers, and DDIM on zero-terminal schedules, come nearest to it.
MOST = {20: 0.1, 37: 0.07, T // 2: 0.06, T: 0.04}
NAMED = [name for name in SAMPLERS.constructors if name != "diffusers"]


def kinds_of(schedule):
    """Return the parameterizations that a sampler takes on a schedule."""
    if schedule.kind == "flow":
        return ["flow_prediction"]
    if schedule.has_zero_terminal_snr:
        return ["v_prediction", "sample"]
    return ["v_prediction", "sample", "epsilon"]


def settings_of(name):
    """Return the arguments under which a sampler is tried: each spacing, if it has any."""
    names = {field.name for field in dataclasses.fields(SAMPLERS.constructors[name])}
    return [{"spacing": spacing} for spacing in SPACINGS] if "spacing" in names else [{}]


def off(x):
    return max(abs(float(x.mean()) - DATA.mean), abs(float(x.std()) - DATA.std))


@functools.cache
def outcome(name, schedule_name, kind, steps, spacing):
    """Return how far the samples are off; None if the sampler is refused."""
    settings = {} if spacing is None else {"spacing": spacing}
    block = {"type": name, "steps": steps, **settings}
    schedule = SCHEDULES[schedule_name]
    try:
        return off(generated(SAMPLERS.parse(block, "sampler").build(), schedule, kind, num=16))
    except InputError:
        return None


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", NAMED)
def test_samples_approach_the_data_as_steps_grow(name, schedule_name):
    schedule = SCHEDULES[schedule_name]
    for i, kind in enumerate(kinds_of(schedule)):
        for settings in settings_of(name):
            for steps in STEPS if i == 0 else (20, 37):
                found = outcome(name, schedule_name, kind, steps, settings.get("spacing"))
                if found is not None and steps in MOST:
                    assert found <= MOST[steps], (kind, steps, settings, found)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", NAMED)
def test_trailing_steps_of_any_number_are_accepted(name, schedule_name):
    """A refusal of everything would satisfy the law."""
    schedule = SCHEDULES[schedule_name]
    kind = kinds_of(schedule)[0]
    spacing = settings_of(name)[0].get("spacing")
    found = [outcome(name, schedule_name, kind, steps, spacing) for steps in STEPS]
    fits = (name == "flow_euler") == (schedule.kind == "flow")

    assert [value is not None for value in found] == [fits] * len(STEPS)


def ddim_by_hand(schedule, kind, timesteps, num):
    """Return x0 [num, 1, 16, 16] of DDIM in float64 along a list of timesteps."""
    network = Optimal(kind, schedule)
    x = Rng(0, 0, range(num)).normal((1, 16, 16), "initial").double()
    for t, following in pairwise([*timesteps, -1]):
        times = torch.full((num,), t)
        found = estimate(kind, network(x, times, {}).double(), x, schedule.level(times))
        if following < 0:
            return found.x0
        after = schedule.level(torch.tensor([following]))
        x = after.alpha * found.x0 + after.sigma * found.eps
    return x


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [
        *((steps, spacing) for steps in (7, 128, 300) for spacing in SPACINGS),
        (600, "trailing"),
        (600, "linspace"),
    ],
)
def test_ddim_steps_to_the_next_timestep_of_its_list(steps, spacing):
    """diffusers steps to t - T // N: at 600 steps it would give a standard deviation of 0.417."""
    schedule = NoiseSchedule.linear()
    made = generator(DDIM(steps=steps, spacing=spacing), schedule, "epsilon")
    scheduler = made.scheduler
    scheduler.set_timesteps(steps)

    expected = ddim_by_hand(schedule, "epsilon", scheduler.timesteps.tolist(), 4)

    x = made._reverse(Optimal("epsilon", schedule), list(range(4)), CPU, None)
    assert_close(x, expected, absolute=2e-3)  # 600 steps in float32
    by_name = DiffusersSampler("DDIMScheduler", steps, {"timestep_spacing": spacing})
    same = generator(by_name, schedule, "epsilon")
    assert torch.equal(same._reverse(Optimal("epsilon", schedule), list(range(4)), CPU, None), x)


@pytest.mark.parametrize(
    ("sampler", "schedule", "kind", "message"),
    [
        (
            DDIM(steps=600, spacing="leading"),
            NoiseSchedule.cosine(),
            "epsilon",
            "ddim would start from pure noise at timestep 599 of 999, where 58 % of the signal are "
            "left. Write spacing: trailing",
        ),
        (
            DPMSolver(steps=500, spacing="leading"),
            NoiseSchedule.cosine(),
            "epsilon",
            "dpm_solver\\+\\+ would start from pure noise at timestep 500 of 999",
        ),
        (
            DiffusersSampler("DDIMScheduler", 600, {"timestep_spacing": "leading"}),
            NoiseSchedule.cosine(),
            "epsilon",
            r"Write arguments: \{timestep_spacing: trailing\}, or other steps",
        ),
        (DDIM(steps=1, spacing="linspace"), NoiseSchedule.linear(), "epsilon", "at timestep 0 of"),
        (
            DPMSolver(steps=1000, spacing="linspace"),
            NoiseSchedule.linear(),
            "epsilon",
            "gives numbers that are not finite at 1000 steps",
        ),
        (
            UniPC(steps=1000, spacing="linspace"),
            NoiseSchedule.linear(),
            "epsilon",
            "gives numbers that are not finite at 1000 steps",
        ),
        (
            Euler(steps=1000),
            NoiseSchedule.linear(zero_terminal_snr=True),
            "v_prediction",
            "euler samples another distribution at 1000 steps on this schedule. A perfect network "
            "of data with mean 0.3 and standard deviation 0.25 would give 0.300 and 0.93",
        ),
        (
            DiffusersSampler("PNDMScheduler", 128, {"timestep_spacing": "trailing"}),
            NoiseSchedule.linear(),
            "epsilon",
            "PNDMScheduler steps by 7 timesteps, but with these arguments 128 steps are farther",
        ),
        (
            DiffusersSampler("DDIMInverseScheduler", 50),
            NoiseSchedule.linear(),
            "epsilon",
            "samples another distribution at 50 steps",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_right_is_refused_with_what_to_write(sampler, schedule, kind, message):
    with pytest.raises(InputError, match=message):
        generator(sampler, schedule, kind)


def test_orders_of_unipc_that_overflow_are_refused():
    with pytest.raises(InputError, match="order"):
        UniPC(order=5)


@pytest.mark.parametrize("steps", [1, 2, 5, 50, 128, 1000])
def test_the_closed_form_of_the_rehearsal_is_what_ddim_gives(steps):
    """Two ways to one number: a recursion of mean and deviation, and samples."""
    schedule = NoiseSchedule.cosine()
    sampler = DDIM(steps=steps)
    scheduler = sampler.build(schedule, "v_prediction", clip=False)
    scheduler.set_timesteps(steps)

    found = sampler_checks.rehearsed(sampler, scheduler, schedule, "v_prediction")

    assert found == pytest.approx(sampler_checks.by_hand(schedule, steps), abs=1e-3)


def test_schedulers_of_distilled_networks_are_not_compared_with_the_data():
    generator(DiffusersSampler("LCMScheduler", 4), NoiseSchedule.scaled_linear(), "epsilon")
