"""Samplers by name: each is a diffusers scheduler class with its settings.

`diffusers` takes any scheduler class by name. A sampler of your own derives from `Sampler` and
brings its scheduler by overriding `build`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch

from difftrain.core.errors import InputError, nearest
from difftrain.core.registry import PositiveInt, Registry, UnitInterval
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseSchedule

SAMPLERS = Registry("sampler", "the reverse process", ["difftrain.generation.samplers"])

Spacing = Literal["trailing", "leading", "linspace"]
RUNS_OWN = (  # arguments of schedulers that fix noise levels, or what the network outputs
    "prediction_type",
    "num_train_timesteps",
    "trained_betas",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "shift",
    "use_dynamic_shifting",
)
DISTILLED = ("LCM", "TCD", "FlowMatchLCM")  # beginnings of schedulers of distilled networks
# Schedulers that step from t to t - T // N, whatever the next timestep of their list is. Of the
# first ones a step can be set right, of the others not.
SETS_STRIDE = ("DDIMScheduler", "DDIMParallelScheduler")
FIXED_STRIDE = ("PNDMScheduler", "CogVideoXDDIMScheduler")


class Sampler(ABC):
    """How x_T becomes x_0: a scheduler in the manner of diffusers, and the number of its steps.

    Attributes:
        steps: Number of steps.
        approaches_data: Whether the samples of a perfect network approach the data as the steps
            grow, which is then checked before training.
    """

    steps: int

    @property
    def approaches_data(self) -> bool:
        """See the class. Samplers of your own are not checked unless they say so."""
        return type(self).__module__ == __name__

    @property
    @abstractmethod
    def class_name(self) -> str:
        """The name of the scheduler class."""

    @property
    def integrates_flow(self) -> bool:
        """Whether it samples from flow schedules rather than from diffusion schedules."""
        return False

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return arguments of the scheduler class apart from the noise levels.

        Args:
            clip: Whether the estimate of x0 is clipped to [-1, 1] (pixels).
            learned_variance: Whether the scheduler reads a learned variance.
        """
        return {}

    def build(
        self,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        clip: bool,
        learned_variance: bool = False,
    ) -> Any:
        """Return a fresh scheduler with the noise levels of a schedule.

        The result has, as in diffusers: `set_timesteps(num_inference_steps, device=...)`,
        `timesteps`, and `step(output, t, x).prev_sample`; optionally `init_noise_sigma` and
        `scale_model_input`.

        Args:
            schedule: The noise levels.
            parameterization: What the network outputs.
            clip: Whether the estimate of x0 is clipped to [-1, 1] (pixels).
            learned_variance: Whether the scheduler reads a learned variance.
        """
        import diffusers

        config = dict(schedule.config)
        if not self.integrates_flow:
            config["prediction_type"] = parameterization
        config |= self.options(clip, learned_variance)
        return getattr(diffusers, self.class_name)(**config)

    def step_arguments(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """Return further arguments of the scheduler's `step`.

        Args:
            generators: One generator for each sample, for samplers that add noise.
        """
        return {}

    def aim(self, scheduler: Any, place: int) -> None:
        """Let a scheduler's next step lead to the next timestep of its list.

        Most schedulers do so by themselves.

        Args:
            scheduler: The scheduler, whose timesteps are set.
            place: The place in `timesteps` of the step to come.
        """


def set_stride(scheduler: Any, place: int) -> None:
    """Let a step of diffusers' DDIM lead to the next timestep of its list.

    It steps from t to t - T // N, with N its number of steps. The timesteps are so far apart only
    where N divides T and the spacing is not "linspace". Here N becomes what gives the distance.

    Args:
        scheduler: The scheduler, whose timesteps are set.
        place: The place in `timesteps` of the step to come.
    """
    timesteps = scheduler.timesteps
    t = int(timesteps[place])
    following = int(timesteps[place + 1]) if place + 1 < len(timesteps) else -1
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, t - following)


@SAMPLERS.register("ddpm")
@dataclass
class DDPM(Sampler):
    """x_{t-1} ~ q(x_{t-1} | x_t, x0_hat): ancestral sampling.

    It uses a learned variance if the model has one.

    Args:
        steps: Number of steps.
        spacing: How the timesteps are spaced, in the words of diffusers.

    Reference:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    """

    steps: PositiveInt = 1000
    spacing: Spacing = "trailing"
    class_name: ClassVar[str] = "DDPMScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return the scheduler's arguments."""
        options: dict[str, Any] = {"timestep_spacing": self.spacing, "clip_sample": clip}
        if learned_variance:
            options["variance_type"] = "learned_range"
        return options

    def step_arguments(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """Return the generators of the noise that each step adds."""
        return {"generator": generators}


@SAMPLERS.register("ddim")
@dataclass
class DDIM(Sampler):
    """x_s = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 v) eps_hat + eta sqrt(v) z.

    v is the variance of q(x_s | x_t, x0), and z ~ N(0, I). eta = 0 is deterministic, eta = 1 is
    ancestral sampling.

    Args:
        steps: Number of steps.
        eta: Share of the posterior's standard deviation that is added as noise.
        spacing: How the timesteps are spaced, in the words of diffusers.

    Reference:
        Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502.
    """

    steps: PositiveInt = 50
    eta: UnitInterval = 0.0
    spacing: Spacing = "trailing"
    class_name: ClassVar[str] = "DDIMScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return the scheduler's arguments."""
        return {"timestep_spacing": self.spacing, "clip_sample": clip, "set_alpha_to_one": True}

    def step_arguments(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """Return eta, and the generators of the noise that each step adds."""
        # At eta = 1 and SNR = 0 diffusers takes the root of a difference that rounds to below 0.
        return {"eta": min(self.eta, 1 - 1e-6), "generator": generators}

    def aim(self, scheduler: Any, place: int) -> None:
        """Let the step lead to the next timestep of the list; see `set_stride`."""
        set_stride(scheduler, place)


@SAMPLERS.register("dpm_solver++")
@dataclass
class DPMSolver(Sampler):
    """DPM-Solver++, multistep, on x0_hat.

    Args:
        steps: Number of steps.
        order: Order of the solver.
        spacing: How the timesteps are spaced, in the words of diffusers.

    Reference:
        Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
        Models", arXiv:2211.01095.
    """

    steps: PositiveInt = 20
    order: Literal[1, 2, 3] = 2
    spacing: Spacing = "trailing"
    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return the scheduler's arguments."""
        return {
            "timestep_spacing": self.spacing,
            "solver_order": self.order,
            "algorithm_type": "dpmsolver++",
        }


@SAMPLERS.register("unipc")
@dataclass
class UniPC(Sampler):
    """Unified predictor-corrector.

    Args:
        steps: Number of steps.
        order: Order of the solver.
        spacing: How the timesteps are spaced, in the words of diffusers.

    Reference:
        Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
        Diffusion Models", arXiv:2302.04867.
    """

    steps: PositiveInt = 20
    order: Literal[1, 2, 3, 4] = 2
    spacing: Spacing = "trailing"
    class_name: ClassVar[str] = "UniPCMultistepScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return the scheduler's arguments."""
        return {"timestep_spacing": self.spacing, "solver_order": self.order}


@SAMPLERS.register("euler")
@dataclass
class Euler(Sampler):
    """Euler steps of the probability-flow ODE in sigma / alpha.

    Args:
        steps: Number of steps.
        spacing: How the timesteps are spaced, in the words of diffusers.

    Reference:
        Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
        arXiv:2206.00364, algorithm 1.
    """

    steps: PositiveInt = 30
    spacing: Spacing = "trailing"
    class_name: ClassVar[str] = "EulerDiscreteScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        """Return the scheduler's arguments."""
        return {"timestep_spacing": self.spacing}


@SAMPLERS.register("flow_euler")
@dataclass
class FlowEuler(Sampler):
    """x_s = x_t + (sigma_s - sigma_t) u_hat on a flow schedule.

    Args:
        steps: Number of steps.

    Reference:
        Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with
        Rectified Flow", arXiv:2209.03003.
    """

    steps: PositiveInt = 50
    class_name: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    @property
    def integrates_flow(self) -> bool:
        """Whether it samples from flow schedules: it does."""
        return True


@SAMPLERS.register("diffusers")
@dataclass
class DiffusersSampler(Sampler):
    """Any scheduler class of diffusers, such as HeunDiscreteScheduler, with arguments of its own.

    Args:
        scheduler: Name of the class.
        steps: Number of steps.
        arguments: Arguments of the class, such as {use_karras_sigmas: true}. Noise levels and what
            the network outputs are the run's own.

    Reference:
        von Platen et al. 2022, "Diffusers: State-of-the-art diffusion models".
    """

    scheduler: str
    steps: PositiveInt = 50
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        signature = self._signature()
        for key in self.arguments:
            if key in RUNS_OWN:
                raise InputError(
                    f"sampling.sampler.arguments.{key}: the run's schedule and parameterization "
                    "fix it. Leave it out."
                )
            if key not in signature:
                known = nearest(key, signature.keys() - set(RUNS_OWN))
                raise InputError(
                    f"sampling.sampler.arguments.{key}: {self.scheduler} has no such argument"
                    f"{known}."
                )

    @property
    def class_name(self) -> str:
        """The name of the scheduler class."""
        return self.scheduler

    @property
    def integrates_flow(self) -> bool:
        """Whether the class is one of diffusers' flow-matching schedulers."""
        return self.scheduler.startswith("FlowMatch")

    def build(
        self,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        clip: bool,
        learned_variance: bool = False,
    ) -> Any:
        """Return a fresh scheduler; see `Sampler.build`.

        Raises:
            InputError: If the class does not take the run's noise levels.
        """
        signature = self._signature()
        # What the run fixes: the class has to take all of it.
        config = {key: value for key, value in schedule.config.items() if not key.startswith("_")}
        if not self.integrates_flow:
            config["prediction_type"] = parameterization
        lacking = [key for key in config if key not in signature]
        if lacking:
            fitting = "FlowMatchEulerDiscreteScheduler" if self.integrates_flow else "DDIMScheduler"
            raise InputError(
                f"sampling.sampler.scheduler: {self.scheduler} does not take {', '.join(lacking)}, "
                "so it would sample at other noise levels than the run's. Write another scheduler, "
                f"such as {fitting}."
            )
        # What the class may take
        if "clip_sample" in signature:
            config["clip_sample"] = clip
        if learned_variance:
            config["variance_type"] = "learned_range"
        return self._class()(**{**config, **self.arguments})

    def step_arguments(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """Return the generators, where the scheduler's `step` adds noise."""
        takes_generator = "generator" in inspect.signature(self._class().step).parameters
        return {"generator": generators} if takes_generator else {}

    @property
    def approaches_data(self) -> bool:
        """Whether the class is made for ordinary networks, and not for distilled ones."""
        return not self.scheduler.startswith(DISTILLED)

    def aim(self, scheduler: Any, place: int) -> None:
        """Let the step of a class like DDIM lead to the next timestep of the list."""
        if self.scheduler in SETS_STRIDE:
            set_stride(scheduler, place)

    def _class(self) -> Any:
        import diffusers

        found = getattr(diffusers, self.scheduler, None)
        try:
            is_scheduler = inspect.isclass(found) and hasattr(found, "set_timesteps")
        except ImportError as error:  # diffusers' stand-in for a class that needs a package
            reason = " ".join(str(error).split())
            raise InputError(f"sampling.sampler.scheduler: {reason}") from error
        if not is_scheduler:
            known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
            raise InputError(
                f"sampling.sampler.scheduler: diffusers has no scheduler {self.scheduler!r}"
                f"{nearest(self.scheduler, known)}."
            )
        return found

    def _signature(self) -> Mapping[str, inspect.Parameter]:
        parameters = dict(inspect.signature(self._class().__init__).parameters)
        del parameters["self"]
        return parameters
