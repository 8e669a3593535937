"""Schedules against diffusers' schedulers: their tables and timesteps are float32, ours float64."""

import warnings

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers.support import assert_close, images
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.errors import InputError
from difftrain.objective.schedule import NoiseSchedule, diffuse, from_betas

# alphas_cumprod is a float32 product of up to 1000 factors, each rounded to 6e-8.
PRODUCT = 1000 * 6e-8
SCHEDULES_OF_DIFFUSERS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": dict(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
    "trained_betas": dict(trained_betas=[0.01, 0.02, 0.1, 0.3]),
    "short": dict(beta_schedule="linear", beta_start=0.01, beta_end=0.4, num_train_timesteps=20),
}
OURS = {
    "linear": NoiseSchedule.linear(1000),
    "scaled_linear": NoiseSchedule.scaled_linear(1000),
    "squaredcos_cap_v2": NoiseSchedule.cosine(1000),
    "short": NoiseSchedule.linear(20, beta_start=0.01, beta_end=0.4),
}


@pytest.mark.parametrize("name", SCHEDULES_OF_DIFFUSERS)
def test_from_diffusers_has_the_schedulers_levels(name):
    scheduler = DDPMScheduler(**SCHEDULES_OF_DIFFUSERS[name])
    schedule = NoiseSchedule.from_diffusers(scheduler)

    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert_close(schedule.alpha**2, scheduler.alphas_cumprod, relative=PRODUCT)
    assert_close(
        schedule.alpha**2 + schedule.sigma**2, torch.ones(schedule.num_timesteps), absolute=1e-15
    )


@pytest.mark.parametrize("name", OURS)
def test_schedule_by_name_is_diffusers_schedule(name):
    reference = NoiseSchedule.from_diffusers(DDPMScheduler(**SCHEDULES_OF_DIFFUSERS[name]))

    assert_close(OURS[name].alpha, reference.alpha, relative=1e-13)
    assert_close(OURS[name].sigma, reference.sigma, relative=1e-12)


def test_zero_terminal_schedule_is_diffusers_one_and_ends_at_exactly_zero():
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
    )
    ours = NoiseSchedule.scaled_linear(1000, zero_terminal_snr=True)

    # The end is a float32 difference of near equals.
    assert_close(ours.alpha**2, scheduler.alphas_cumprod, relative=PRODUCT, absolute=1e-7)
    assert ours.alpha[-1] == 0
    assert ours.sigma[-1] == 1
    assert ours.has_zero_terminal_snr
    assert ours.alpha[0] == NoiseSchedule.scaled_linear(1000).alpha[0]
    assert_close(NoiseSchedule.from_diffusers(scheduler).alpha, ours.alpha, absolute=1e-15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_is_diffusers_flow_matching_grid(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    ours = NoiseSchedule.flow(1000, shift)

    assert schedule.kind == ours.kind == "flow"
    # theirs: float32, from noise to image.
    assert_close(schedule.sigma, scheduler.sigmas.flip(0), absolute=2e-7)
    assert_close(ours.sigma, schedule.sigma, absolute=1e-15)
    assert_close(ours.model_time(torch.arange(1000)), scheduler.timesteps.flip(0), absolute=2e-4)
    assert_close(ours.alpha + ours.sigma, torch.ones(1000), absolute=1e-15)
    assert ours.has_zero_terminal_snr


def test_other_schedulers_of_the_same_config_have_the_same_levels():
    scheduler = EulerDiscreteScheduler(**SCHEDULES_OF_DIFFUSERS["scaled_linear"])
    assert_close(
        NoiseSchedule.from_diffusers(scheduler).alpha, OURS["scaled_linear"].alpha, absolute=1e-15
    )


def test_a_multistep_scheduler_of_a_flow_model_is_a_flow_schedule():
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_diffusers(scheduler)

    assert schedule.kind == "flow"
    # Its 1000 sigmas are 1001 points from 1 to 1/1000 without the last, so they lie between ours.
    assert_close(schedule.sigma.max(), scheduler.sigmas.max(), absolute=2e-6)
    assert_close(schedule.sigma, scheduler.sigmas[:-1].flip(0), absolute=3e-3)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_cogvideox_divides_the_snr_by_its_scale(zero_terminal):
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=zero_terminal)
    schedule = NoiseSchedule.from_diffusers(scheduler)

    # Theirs is float64 too.
    assert_close(schedule.alpha**2, scheduler.alphas_cumprod, relative=1e-9, absolute=1e-12)
    again = NoiseSchedule.from_diffusers(schedule.config)
    assert_close(again.alpha, schedule.alpha, absolute=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(100),
        NoiseSchedule.linear(100, zero_terminal_snr=True),
        NoiseSchedule.scaled_linear(100),
        NoiseSchedule.cosine(100),
        NoiseSchedule.sigmoid(100),
        NoiseSchedule.sigmoid(100, zero_terminal_snr=True),
        NoiseSchedule.flow(100, shift=2.5),
    ],
    ids=repr,
)
def test_config_gives_the_same_schedule_again(schedule):
    again = NoiseSchedule.from_diffusers(schedule.config)

    assert again.kind == schedule.kind
    assert again.config == schedule.config
    assert torch.equal(again.alpha, schedule.alpha)
    assert torch.equal(again.sigma, schedule.sigma)


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        (DDPMScheduler, NoiseSchedule.linear(50)),
        (DDIMScheduler, NoiseSchedule.sigmoid(50)),
        (DDIMScheduler, NoiseSchedule.cosine(50)),
        (DDIMScheduler, NoiseSchedule.scaled_linear(50, zero_terminal_snr=True)),
        (FlowMatchEulerDiscreteScheduler, NoiseSchedule.flow(50, 3.0)),
    ],
)
def test_config_makes_a_diffusers_scheduler_of_the_same_levels(scheduler, schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = scheduler.from_config(schedule.config)

    if schedule.kind == "flow":
        assert_close(made.sigmas.flip(0), schedule.sigma, absolute=2e-7)
    else:
        assert_close(made.alphas_cumprod, schedule.alpha**2, relative=PRODUCT, absolute=1e-7)


def test_dynamic_shifting_is_rejected_with_a_remedy():
    with pytest.raises(InputError) as error:
        NoiseSchedule.from_diffusers(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert str(error.value) == (
        "FlowMatchEulerDiscreteScheduler shifts its noise levels by the resolution "
        "(use_dynamic_shifting). Write the shift for your resolution instead: "
        "schedule: {type: flow, shift: 3.0}."
    )


def test_a_scheduler_without_a_known_beta_schedule_is_rejected():
    for scheduler, given_schedule in [
        (EDMEulerScheduler(), None),
        (DDPMScheduler(beta_schedule="laplace"), "laplace"),
    ]:
        with pytest.raises(InputError) as error:
            NoiseSchedule.from_diffusers(scheduler)
        assert str(error.value) == (
            f"{type(scheduler).__name__}: unknown beta_schedule {given_schedule!r}; "
            "known: linear, scaled_linear, squaredcos_cap_v2, sigmoid. "
            "Write a schedule into the recipe instead: schedule: {type: cosine}."
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoiseSchedule.linear(10, beta_end=2.0),
        lambda: NoiseSchedule.sigmoid(10, start=1.0, end=1.0),
        lambda: from_betas(torch.tensor([0.1, -0.1]), {}),
    ],
)
def test_betas_outside_0_and_1_are_rejected(make):
    with pytest.raises(
        InputError,
        match=r"^schedule: beta_t must lie between 0 and 1, but it is .* at t = \d+\. Write",
    ):
        make()


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(100), NoiseSchedule.sigmoid(100), NoiseSchedule.flow(100, 3.0)],
    ids=repr,
)
def test_signal_falls_and_noise_grows_with_t(schedule):
    assert bool((schedule.alpha.diff() < 0).all())
    assert bool((schedule.sigma.diff() > 0).all())


@given(t=st.lists(st.integers(0, 99), min_size=1, max_size=5), steps=st.integers(1, 5))
def test_level_before_is_the_level_below_and_clean_below_zero(t, steps):
    schedule = NoiseSchedule.cosine(100)
    before = schedule.level_before(torch.tensor(t), steps)

    for i, at in enumerate(t):
        if at - steps < 0:
            assert (before.alpha[i], before.sigma[i]) == (1, 0)
        else:
            assert (before.alpha[i], before.sigma[i]) == (
                schedule.alpha[at - steps],
                schedule.sigma[at - steps],
            )


def test_snr_is_the_squared_ratio_and_log_snr_its_logarithm():
    level = NoiseSchedule.linear(100, zero_terminal_snr=True).level(torch.arange(100))

    assert_close(level.snr, level.alpha**2 / level.sigma**2, relative=1e-14)
    assert_close(level.log_snr.exp(), level.snr, relative=1e-12)
    assert level.snr[-1] == 0
    assert level.log_snr[-1] == float("-inf")
    assert torch.equal(level[2:5].alpha, level.alpha[2:5])


def test_diffusion_models_are_fed_the_index_and_flow_models_a_thousand_sigma():
    t = torch.tensor([0, 7, 9])

    assert torch.equal(NoiseSchedule.linear(10).model_time(t), t)
    assert torch.equal(NoiseSchedule.flow(10).model_time(t), torch.tensor([1.0, 8.0, 10.0]))


def test_diffuse_equals_diffusers_add_noise():
    x0 = images(3)
    eps = images(3, seed=1)
    t = torch.tensor([0, 500, 999])
    scheduler = DDPMScheduler(**SCHEDULES_OF_DIFFUSERS["linear"])

    # their alphas_cumprod is float32: sqrt(1 - alpha_bar) at t = 0 is off by 3e-8 / (2 * 0.01)
    assert_close(OURS["linear"].diffuse(x0, eps, t), scheduler.add_noise(x0, eps, t), absolute=5e-6)


def test_diffuse_casts_after_the_tables_were_computed():
    x0 = images(1).half()
    eps = images(1, seed=1).half()
    t = torch.tensor([0])
    schedule = OURS["scaled_linear"]

    x_t = schedule.diffuse(x0, eps, t)

    assert x_t.dtype == torch.float16
    # 2 roundings of half precision near 1.
    assert_close(x_t, diffuse(x0.double(), eps.double(), schedule.level(t)), absolute=2e-3)
