"""Whether a sampler can work: checked before training, by rules and by a rehearsal."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import registered_name
from difftrain.generation.samplers import FIXED_STRIDE, DiffusersSampler, Sampler
from difftrain.objective.parameterization import Parameterization, target
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule

REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)
MEAN, STD, NUM = 0.3, 0.25, 4096  # of the rehearsal's data: independent Gaussian numbers
FEW_STEPS = 0.1  # error of DDIM by hand above which steps are too few to tell anything
LATE_START = 0.03  # signal at the first timestep above that at the last one of the schedule


def check_sampler(
    sampler: Sampler,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    shape: tuple[int, ...],
    spaces_sigmas_evenly: bool = False,
) -> None:
    """Refuse a sampler that cannot sample from the schedule, by rules and by a rehearsal.

    Args:
        sampler: The sampler.
        schedule: The noise levels.
        parameterization: What the network outputs.
        shape: Shape of one x_t.
        spaces_sigmas_evenly: Whether noise levels are spaced evenly before the shift.

    Raises:
        InputError: With what to write instead.
    """
    name = registered_name(sampler)
    is_flow = schedule.kind == "flow"
    if sampler.integrates_flow != is_flow:
        fitting = "flow_euler" if is_flow else "ddim"
        raise InputError(
            f"sampling.sampler: {name} does not integrate a {schedule.kind} schedule. "
            f"Write sampler: {{type: {fitting}}}."
        )
    if (parameterization == "flow_prediction") != is_flow:
        fitting = "flow_prediction" if is_flow else "epsilon, sample or v_prediction"
        raise InputError(
            f"parameterization: no sampler takes {parameterization} on a {schedule.kind} schedule. "
            f"Write {fitting}."
        )
    if sampler.steps > schedule.num_timesteps:
        raise InputError(
            f"sampling.sampler.steps: {sampler.steps} steps, but the schedule has "
            f"{schedule.num_timesteps} timesteps. Write at most {schedule.num_timesteps}."
        )
    if schedule.has_zero_terminal_snr and parameterization == "epsilon":
        return  # no sampler can make up for it; the objective says what to write instead
    try:
        try_one_step(sampler, schedule, parameterization, shape, spaces_sigmas_evenly)
        scheduler = sampler.build(schedule, parameterization, clip=False)
        scheduler.set_timesteps(**timestep_arguments(sampler, schedule, spaces_sigmas_evenly))
        if not is_flow:
            check_timesteps(sampler, scheduler, schedule)
        found = rehearsed(sampler, scheduler, schedule, parameterization)
    except InputError:
        raise
    except REFUSALS as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"sampling.sampler: {name} fails at {sampler.steps} steps ({type(error).__name__}: "
            f"{first_line}). Correct its arguments, or write sampler: {{type: {plain(schedule)}}}."
        ) from error
    check_rehearsal(sampler, schedule, found)


def plain(schedule: NoiseSchedule) -> str:
    """Return the name of the sampler that works on every schedule of this kind."""
    return "flow_euler" if schedule.kind == "flow" else "ddim"


def check_timesteps(sampler: Sampler, scheduler: Any, schedule: NoiseSchedule) -> None:
    """Refuse timesteps that start late, and a scheduler that does not step to the next one.

    Args:
        sampler: The sampler.
        scheduler: Its scheduler, whose timesteps are set.
        schedule: The noise levels.

    Raises:
        InputError: With what to write instead.
    """
    name, last = registered_name(sampler), schedule.num_timesteps - 1
    timesteps = [float(t) for t in scheduler.timesteps]
    gaps = [t - following for t, following in pairwise([*timesteps, -1.0])]
    first = min(int(timesteps[0]), last)
    late = last - first
    signal = float(schedule.alpha[first] - schedule.alpha[last])
    by_class = isinstance(sampler, DiffusersSampler)
    trailing = "arguments: {timestep_spacing: trailing}" if by_class else "spacing: trailing"
    if late > 1.5 * max(gaps) and signal > LATE_START:
        raise InputError(
            f"sampling.sampler: {name} would start from pure noise at timestep {first} of {last}, "
            f"where {100 * float(schedule.alpha[first]):.0f} % of the signal are left. Write "
            f"{trailing}, or other steps."
        )
    class_name, stride = sampler.class_name, schedule.num_timesteps // sampler.steps
    taken = {stride, stride // 2, stride - stride // 2, 0}  # PNDM starts with half steps
    if class_name in FIXED_STRIDE and any(abs(gap) not in taken for gap in gaps[:-1]):
        raise InputError(
            f"sampling.sampler.steps: {class_name} steps by {stride} timesteps, but with these "
            f"arguments {sampler.steps} steps are farther apart. Write steps that divide the "
            f"schedule's {schedule.num_timesteps} timesteps, or another scheduler, such as "
            "DDIMScheduler."
        )


def rehearsed(
    sampler: Sampler,
    scheduler: Any,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
) -> tuple[float, float]:
    """Sample Gaussian numbers with a perfect network, through all steps.

    Args:
        sampler: The sampler.
        scheduler: Its scheduler, whose timesteps are set.
        schedule: The noise levels.
        parameterization: What the network outputs.

    Returns:
        Mean and standard deviation of the samples; those of the data are `MEAN` and `STD`.
    """
    quantiles = (torch.arange(NUM) + 0.5) / NUM
    noise = torch.special.ndtri(quantiles)[torch.randperm(NUM, generator=seeded())]
    x = noise.view(1, 1, 64, -1) * getattr(scheduler, "init_noise_sigma", 1.0)
    arguments = sampler.step_arguments([seeded()])
    for place, t in enumerate(scheduler.timesteps):
        x_in = x
        if hasattr(scheduler, "scale_model_input"):
            x_in = scheduler.scale_model_input(x, t)
        output = perfect(parameterization, x_in, level_at(schedule, float(t)))
        sampler.aim(scheduler, place)
        x = scheduler.step(output, t, x, **arguments).prev_sample
    return float(x.double().mean()), float(x.double().std())


def seeded() -> torch.Generator:
    """Return a generator of its own, always with the same numbers."""
    return torch.Generator().manual_seed(0)


def perfect(kind: Parameterization, x: Tensor, level: NoiseLevel) -> Tensor:
    """Return what a perfect network of the rehearsal's data outputs for x [...]."""
    wide = x.double()
    variance = level.alpha**2 * STD**2 + level.sigma**2
    apart = wide - level.alpha * MEAN
    x0 = MEAN + level.alpha * STD**2 / variance * apart
    eps = level.sigma / variance * apart
    return target(kind, x0, eps, level).to(x)


def level_at(schedule: NoiseSchedule, time: float) -> NoiseLevel:
    """Return the noise level [1] at what a scheduler calls a timestep.

    Between two timesteps sigma / alpha grows geometrically, as in diffusers. On a flow schedule the
    time is T sigma.
    """
    if schedule.kind == "flow":
        sigma = torch.tensor([time / schedule.num_timesteps], dtype=torch.float64)
        return NoiseLevel(1 - sigma, sigma)
    below = min(max(int(time), 0), schedule.num_timesteps - 1)
    share = time - below
    if share <= 0 or below + 1 >= schedule.num_timesteps:
        return schedule.level(torch.tensor([below]))
    ends = schedule.level(torch.tensor([below, below + 1]))
    ratio = (ends.sigma / ends.alpha).clamp(min=1e-12).log()
    ratio = (ratio[:1] * (1 - share) + ratio[1:] * share).exp()
    alpha = 1 / (1 + ratio**2).sqrt()
    return NoiseLevel(alpha, ratio * alpha)


def by_hand(schedule: NoiseSchedule, steps: int) -> tuple[float, float]:
    """Return mean and standard deviation of the rehearsal's samples by DDIM, in closed form.

    Each step is linear in x, so the samples stay Gaussian. Timesteps are spaced "trailing".

    Args:
        schedule: The noise levels.
        steps: Number of steps.
    """
    total = schedule.num_timesteps
    places = [round(total - k * total / steps) - 1 for k in range(steps)]
    mean, std = 0.0, 1.0
    for t, following in pairwise([*places, -1]):
        level = schedule.level(torch.tensor([t]))
        alpha, sigma = float(level.alpha), float(level.sigma)
        after = schedule.level(torch.tensor([max(following, 0)]))
        alpha_s, sigma_s = float(after.alpha), float(after.sigma)
        if following < 0:
            alpha_s, sigma_s = 1.0, 0.0
        variance = alpha**2 * STD**2 + sigma**2
        slope = (alpha_s * alpha * STD**2 + sigma_s * sigma) / variance
        mean = alpha_s * MEAN + slope * (mean - alpha * MEAN)
        std = slope * std
    return mean, std


def check_rehearsal(sampler: Sampler, schedule: NoiseSchedule, found: tuple[float, float]) -> None:
    """Refuse a sampler whose samples are not numbers, or of another distribution than the data.

    With few steps every sampler is off. So it may be off by 0.02 more than twice DDIM by hand, and
    by anything where DDIM is off by much itself.

    Args:
        sampler: The sampler.
        schedule: The noise levels.
        found: What `rehearsed` returned.

    Raises:
        InputError: With what to write instead.
    """
    name, (mean, std) = registered_name(sampler), found
    remedy = f"Write other steps or another spacing, or sampler: {{type: {plain(schedule)}}}."
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise InputError(
            f"sampling.sampler: {name} gives numbers that are not finite at {sampler.steps} steps "
            f"on this schedule. {remedy}"
        )
    if not sampler.approaches_data:
        return
    usual = off(*by_hand(schedule, sampler.steps))
    if usual < FEW_STEPS and off(mean, std) > 2 * usual + 0.02:
        raise InputError(
            f"sampling.sampler: {name} samples another distribution at {sampler.steps} steps on "
            f"this schedule. A perfect network of data with mean {MEAN} and standard deviation "
            f"{STD} would give {mean:.3f} and {std:.3f}. {remedy}"
        )


def off(mean: float, std: float) -> float:
    """Return how far samples are from the rehearsal's data."""
    return max(abs(mean - MEAN), abs(std - STD))


def timestep_arguments(
    sampler: Sampler, schedule: NoiseSchedule, spaces_sigmas_evenly: bool
) -> dict[str, Any]:
    """Return the arguments of a scheduler's `set_timesteps`.

    Args:
        sampler: The sampler.
        schedule: The noise levels; a schedule that shifts by the resolution states its shift.
        spaces_sigmas_evenly: Whether noise levels are spaced evenly before the shift.
    """
    steps = sampler.steps
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if spaces_sigmas_evenly:
        spacing = (1 - 1 / steps) / max(1, steps - 1)
        arguments["sigmas"] = [1 - i * spacing for i in range(steps)]
    if schedule.log_shift is not None:
        arguments["mu"] = schedule.log_shift
    return arguments


def try_one_step(
    sampler: Sampler,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    shape: tuple[int, ...],
    spaces_sigmas_evenly: bool,
) -> None:
    """Build the scheduler and take one step on zeros, without catching what it raises.

    Args:
        sampler: The sampler.
        schedule: The noise levels.
        parameterization: What the network outputs.
        shape: Shape of one x_t.
        spaces_sigmas_evenly: Whether noise levels are spaced evenly before the shift.
    """
    scheduler = sampler.build(schedule, parameterization, clip=False)
    scheduler.set_timesteps(**timestep_arguments(sampler, schedule, spaces_sigmas_evenly))
    x, t = torch.zeros(1, *shape), scheduler.timesteps[0]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    sampler.aim(scheduler, 0)
    scheduler.step(x, t, x, **sampler.step_arguments([seeded()]))
