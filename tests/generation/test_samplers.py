"""Samplers by name: their noise levels, any scheduler class of diffusers, and own schedulers."""

import math
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.generation import (
    COSINE,
    CPU,
    DATA,
    DIFFUSION_KINDS,
    FLOW,
    LINEAR,
    ZERO_TERMINAL,
    Optimal,
    generated,
    generator,
)
from helpers.support import assert_close
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt
from difftrain.generation.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    DiffusersSampler,
    DPMSolver,
    Euler,
    FlowEuler,
    Sampler,
    UniPC,
)
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Cond
from difftrain.objective.variance import LearnedRange

# The schedules handed to diffusers


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    list(
        product(
            [DDPM(), DDIM(), DPMSolver(), UniPC(), Euler()],
            [LINEAR, COSINE, ZERO_TERMINAL, NoiseSchedule.sigmoid(200)],
        )
    ),
)
def test_a_diffusers_scheduler_has_the_schedules_own_levels(sampler, schedule):
    """Its tables are float32, so alpha^2 is off by up to 1e-6.

    Where ours ends at 0, some schedulers write 2^-24.
    """
    made = sampler.build(schedule, "v_prediction", clip=False)

    assert made.config.num_train_timesteps == schedule.num_timesteps
    assert_close(made.alphas_cumprod.double(), schedule.alpha**2, absolute=2e-6)


def test_pixels_are_clipped_and_latents_are_not():
    assert DDIM().build(LINEAR, "epsilon", clip=True).config.clip_sample
    assert not DDPM().build(LINEAR, "epsilon", clip=False).config.clip_sample


# What is refused


@pytest.mark.parametrize(
    ("sampler", "schedule", "kind", "message"),
    [
        (
            FlowEuler(),
            LINEAR,
            "epsilon",
            "flow_euler does not integrate a diffusion schedule. Write sampler: {type: ddim}",
        ),
        (
            DPMSolver(),
            FLOW,
            "flow_prediction",
            "dpm_solver++ does not integrate a flow schedule. Write sampler: {type: flow_euler}",
        ),
        (
            FlowEuler(),
            FLOW,
            "epsilon",
            "no sampler takes epsilon on a flow schedule. Write flow_prediction",
        ),
        (
            DDIM(),
            LINEAR,
            "flow_prediction",
            "no sampler takes flow_prediction on a diffusion schedule. Write epsilon, sample or",
        ),
        (
            DDPM(),
            NoiseSchedule.linear(10),
            "epsilon",
            "1000 steps, but the schedule has 10 timesteps. Write at most 10",
        ),
    ],
)
def test_what_diffusers_cannot_integrate_is_refused(sampler, schedule, kind, message):
    with pytest.raises(InputError) as error:
        generator(sampler, schedule, kind)

    assert message in str(error.value)


# Any scheduler class of diffusers


def heun(steps: int = 50, **arguments: Any) -> DiffusersSampler:
    return DiffusersSampler("HeunDiscreteScheduler", steps, arguments)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [*((LINEAR, kind) for kind in DIFFUSION_KINDS), (COSINE, "v_prediction")],
    ids=["epsilon", "sample", "v_prediction", "cosine"],
)
def test_a_scheduler_by_its_class_name_gives_the_datas_mean_and_spread(schedule, kind):
    """Heun is of second order: at 50 steps it loses 1 % of the spread, where DDIM loses 10 %."""
    x = generated(heun(), schedule, kind)

    assert_close(x.mean(), DATA.mean, absolute=4 * DATA.std / math.sqrt(x.numel()))
    assert_close(x.std(), DATA.std, relative=0.02)


@pytest.mark.parametrize(
    ("name", "sampler", "arguments"),
    [
        ("DDIMScheduler", DDIM(steps=5), {"timestep_spacing": "trailing"}),
        ("DDPMScheduler", DDPM(steps=5), {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", Euler(steps=5), {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", DPMSolver(steps=5), {"timestep_spacing": "trailing"}),
    ],
)
def test_a_class_name_gives_the_bits_of_the_registered_sampler(name, sampler, arguments):
    """The noise of each step belongs to the sample in both."""
    by_name = DiffusersSampler(name, 5, arguments)

    assert torch.equal(generated(by_name, num=3), generated(sampler, num=3))


def test_a_flow_scheduler_by_its_class_name_has_the_schedules_shift():
    by_name = DiffusersSampler("FlowMatchEulerDiscreteScheduler", 4)

    x = generated(by_name, FLOW, "flow_prediction", num=2)

    assert torch.equal(x, generated(FlowEuler(steps=4), FLOW, "flow_prediction", num=2))


def test_arguments_reach_the_scheduler():
    made = generator(heun(5, use_karras_sigmas=True))

    assert made.scheduler.config.use_karras_sigmas
    assert made.scheduler.config.clip_sample
    assert made.scheduler.config.prediction_type == "epsilon"


def test_a_recipe_can_name_the_class():
    block = {"type": "diffusers", "scheduler": "HeunDiscreteScheduler", "steps": 7}

    sampler = SAMPLERS.parse(block, "sampling.sampler").build()

    assert (sampler.class_name, sampler.steps) == ("HeunDiscreteScheduler", 7)


def test_a_learned_variance_reaches_an_ancestral_scheduler_by_its_class_name():
    optimal = Optimal("epsilon", LINEAR)

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.cat([optimal(x, time, cond), torch.full_like(x, 0.3)], 1)

    by_name = DiffusersSampler("DDPMScheduler", 5, {"timestep_spacing": "trailing"})
    found = []
    for sampler in (by_name, DDPM(steps=5)):
        made = generator(sampler, shape=(1, 4, 4), variance=LearnedRange())
        found.append(made._reverse(network, [0, 1], CPU, None))

    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"scheduler": "HeunDiscreteScheduler", "arguments": {"use_karras_sigma": True}},
            "sampling.sampler.arguments.use_karras_sigma: HeunDiscreteScheduler has no such "
            "argument (did you mean 'use_karras_sigmas'?)",
        ),
        (
            {"scheduler": "HeunDiscreteScheduler", "arguments": {"beta_start": 0.1}},
            "sampling.sampler.arguments.beta_start: the run's schedule and parameterization fix",
        ),
        (
            {"scheduler": "HeunDiscretScheduler"},
            "no scheduler 'HeunDiscretScheduler' (did you mean 'HeunDiscreteScheduler'?)",
        ),
        ({"scheduler": "UNet2DModel"}, "diffusers has no scheduler 'UNet2DModel'"),
    ],
)
def test_a_class_or_an_argument_that_does_not_exist_is_named(given, message):
    with pytest.raises(InputError) as error:
        DiffusersSampler(**given)

    assert message in str(error.value)


def test_a_class_whose_package_is_missing_is_named():
    """diffusers has a stand-in for it, which raises ImportError for every attribute."""
    import diffusers

    if "torch_sde" in str(getattr(diffusers.DPMSolverSDEScheduler, "__module__", "")):
        pytest.skip("torchsde is installed")
    with pytest.raises(InputError, match=r"sampling.sampler.scheduler: .*torchsde"):
        DiffusersSampler("DPMSolverSDEScheduler")


@pytest.mark.parametrize(
    ("name", "schedule", "kind", "lacking"),
    [
        ("EDMEulerScheduler", LINEAR, "epsilon", "beta_schedule, beta_start, beta_end"),
        ("EDMEulerScheduler", COSINE, "epsilon", "beta_schedule"),
        ("HeunDiscreteScheduler", ZERO_TERMINAL, "v_prediction", "rescale_betas_zero_snr"),
        ("RePaintScheduler", LINEAR, "epsilon", "prediction_type"),
    ],
)
def test_a_scheduler_that_does_not_take_the_noise_levels_is_refused(name, schedule, kind, lacking):
    with pytest.raises(InputError) as error:
        generator(DiffusersSampler(name, 10), schedule, kind)

    message = f"sampling.sampler.scheduler: {name} does not take {lacking}, so it would sample at"
    assert message in str(error.value)


def test_a_flow_scheduler_that_does_not_space_noise_levels_evenly_is_refused():
    heun_of_flows = DiffusersSampler("FlowMatchHeunDiscreteScheduler", 4)
    generator(heun_of_flows, FLOW, "flow_prediction")

    with pytest.raises(InputError, match="diffusers fails at 4 steps"):
        generator(heun_of_flows, FLOW, "flow_prediction", spaces_sigmas_evenly=True)


# Own schedulers


class Plain:
    """Deterministic steps x_s = alpha_s x0_hat + sigma_s eps_hat; the last one returns x0_hat."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, num_inference_steps, device=device).long()

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> SimpleNamespace:
        at = LINEAR.level(t.reshape(1))
        x0 = (x - at.sigma.item() * output) / at.alpha.item()
        place = self.timesteps.tolist().index(int(t))
        if place == len(self.timesteps) - 1:
            return SimpleNamespace(prev_sample=x0)
        before = LINEAR.level(self.timesteps[place + 1].reshape(1))
        x_before = before.alpha.item() * x0 + before.sigma.item() * output
        return SimpleNamespace(prev_sample=x_before)


@dataclass
class OwnSampler(Sampler):
    steps: PositiveInt = 50
    scheduler: Any = Plain
    class_name = "Plain"

    def build(self, *given: Any, **more: Any) -> Any:
        return self.scheduler()


def test_an_own_scheduler_samples_the_data():
    x = generated(OwnSampler(steps=250), num=64)

    assert_close(x.mean(), DATA.mean, absolute=4 * DATA.std / math.sqrt(x.numel()))
    assert_close(x.std(), DATA.std, relative=0.04)


class Broken(Plain):
    def step(self, output: Tensor, t: Tensor, x: Tensor) -> SimpleNamespace:
        return super().step(output[0, 0], t, x).missing


def test_an_own_scheduler_that_fails_is_refused_with_the_generator():
    """Not after training."""
    with pytest.raises(
        InputError,
        match=r"sampling.sampler: OwnSampler fails at 50 steps \(AttributeError: .*missing",
    ):
        generator(OwnSampler(scheduler=Broken))
