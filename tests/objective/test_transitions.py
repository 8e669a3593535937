"""One reverse step equals diffusers' samplers' with the same estimate and noise."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from helpers.support import assert_close, images

from difftrain.objective.parameterization import Estimate, estimate
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.transitions import ancestral, beta, ddim, flow_euler, posterior
from difftrain.objective.variance import LearnedRange

X_T, OUTPUT = images(1), images(1, seed=1)
SCHEDULE = NoiseSchedule.linear(1000)
ROUNDING = (
    1e-11  # both in float64; dividing by alpha and by sigma = 0.01 multiplies 1e-16 by up to 1e4
)


def levels(t, schedule=SCHEDULE, steps=1):
    at = torch.tensor([t])
    return schedule.level(at), schedule.level_before(at, steps)


def in_float64(scheduler):
    """Return the scheduler with our table: 1 - alpha_bar / alpha_bar' keeps 3 digits of float32."""
    scheduler.alphas_cumprod = SCHEDULE.alpha**2
    return scheduler


def fixed(monkeypatch, module, noise):
    """diffusers draws its own noise inside step(): hand it ours."""
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor", lambda *args, **kwargs: noise
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_ancestral_step_equals_ddpm(monkeypatch, kind, t):
    noise = images(1, seed=2)
    fixed(monkeypatch, "scheduling_ddpm", noise)
    scheduler = in_float64(
        DDPMScheduler(prediction_type=kind, clip_sample=False, variance_type="fixed_small")
    )
    level, before = levels(t)

    ours = ancestral(X_T, estimate(kind, OUTPUT, X_T, level), level, before, noise)

    expected = scheduler.step(OUTPUT, t, X_T).prev_sample
    assert_close(ours, expected, absolute=ROUNDING)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [980, 500, 20])
def test_ddim_step_equals_diffusers(t, eta):
    noise = images(1, seed=2)
    scheduler = in_float64(DDIMScheduler(clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(50)  # every 20th timestep
    level, before = levels(t, steps=20)

    ours = ddim(X_T, estimate("epsilon", OUTPUT, X_T, level), level, before, eta, noise)

    expected = scheduler.step(OUTPUT, t, X_T, eta=eta, variance_noise=noise).prev_sample
    assert_close(ours, expected, absolute=ROUNDING)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_flow_step_equals_diffusers_euler(t, shift):
    schedule = NoiseSchedule.flow(1000, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # unshifted: it shifts them, and appends 0.
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 1000))
    level, before = levels(t, schedule)

    ours = flow_euler(X_T, estimate("flow_prediction", OUTPUT, X_T, level), level, before)

    expected = scheduler.step(OUTPUT, scheduler.timesteps[999 - t], X_T).prev_sample
    assert_close(ours, expected, absolute=1e-6)  # float32 sigmas


def test_ddim_with_eta_1_is_the_ancestral_step():
    level, before = levels(500)
    found, noise = estimate("epsilon", OUTPUT, X_T, level), images(1, seed=2)

    assert_close(
        ddim(X_T, found, level, before, 1.0, noise),
        ancestral(X_T, found, level, before, noise),
        absolute=1e-12,
    )


def test_ddim_with_eta_needs_noise():
    level, before = levels(500)
    with pytest.raises(ValueError, match=r"^DDIM with eta = 0\.5 adds noise, but noise is None$"):
        ddim(X_T, estimate("epsilon", OUTPUT, X_T, level), level, before, 0.5)


@pytest.mark.parametrize(
    "step",
    [
        lambda found, *levels: ancestral(X_T, found, *levels, images(1, seed=2)),
        lambda *a: ddim(X_T, *a),
        lambda *a: flow_euler(X_T, *a),
    ],
    ids=["ancestral", "ddim", "flow_euler"],
)
def test_the_last_step_returns_the_estimated_image(step):
    schedule = NoiseSchedule.flow(10)
    level, before = levels(0, schedule)
    found = estimate("flow_prediction", OUTPUT, X_T, level)

    assert_close(step(found, level, before), found.x0, absolute=1e-14)


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.flow(1000)], ids=repr)
def test_forward_steps_compose_to_the_level_of_the_schedule(schedule):
    t = torch.arange(1, 1000)
    level, before = schedule.level(t), schedule.level_before(t)
    ratio = level.alpha / before.alpha

    assert_close(ratio**2 * before.sigma**2 + beta(level, before), level.sigma**2, relative=1e-12)
    assert bool((beta(level, before) > 0).all())


def test_beta_of_the_linear_schedule_is_its_beta():
    t = torch.arange(1000)
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

    assert_close(beta(SCHEDULE.level(t), SCHEDULE.level_before(t)), expected, absolute=1e-14)


def test_posterior_is_bayes_rule():
    # With x0 known, the prior of x_s is N(alpha_s x0, sigma_s^2), and the likelihood of x_t is
    # N(r x_s, beta): precisions add.
    level = NoiseLevel(*(torch.tensor([v], dtype=torch.float64) for v in (0.5, 0.9)))
    before = NoiseLevel(*(torch.tensor([v], dtype=torch.float64) for v in (0.8, 0.4)))
    x0 = OUTPUT
    r = 0.5 / 0.8
    step = beta(level, before)
    precision = 1 / 0.4**2 + r**2 / step

    found = posterior(x0, X_T, level, before)

    assert_close(found.variance, 1 / precision, relative=1e-13)
    assert_close(found.mean, (0.8 * x0 / 0.4**2 + r * X_T / step) / precision, absolute=1e-13)


def test_a_step_of_the_true_image_has_the_levels_marginal():
    # For every x0, a step from x_t ~ q(x_t | x0) with the true x0 is distributed as q(x_s | x0).
    level, before = (
        NoiseLevel(x.alpha.expand(50_000), x.sigma.expand(50_000)) for x in levels(500, steps=100)
    )
    generator = torch.Generator().manual_seed(0)
    eps, noise = (
        torch.randn(50_000, 1, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    x0 = torch.full_like(eps, 0.5)
    x_t = expand_like(level.alpha, eps) * x0 + expand_like(level.sigma, eps) * eps

    x_s = ancestral(x_t, Estimate(x0, eps), level, before, noise)

    sigma = before.sigma[0].item()
    assert_close(x_s.mean(), before.alpha[0] * 0.5, absolute=4 * sigma / 50_000**0.5)
    assert_close(x_s.var(), sigma**2, absolute=4 * sigma**2 * (2 / 50_000) ** 0.5)


def test_an_ancestral_step_with_a_learned_variance_is_diffusers_ddpm_step():
    scheduler = DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        timestep_spacing="leading",
        variance_type="learned_range",
    )
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.linear()
    x, output, v = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    t, s = 500, 400
    both = torch.cat([output, v], dim=1)
    step = scheduler.step(both, t, x, generator=torch.Generator().manual_seed(2))
    level, before = (schedule.level(torch.full((4,), n)) for n in (t, s))
    implied = estimate("epsilon", output, x, level)
    log_variance = LearnedRange().log_variance(v, level, before)

    found = ancestral(x, implied, level, before, noise, log_variance)

    assert_close(found, step.prev_sample, absolute=1e-4)  # its tables are float32
