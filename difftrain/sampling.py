"""Generation through diffusers schedulers, with noise keyed by sample index.

The generated set is cut into fixed blocks of consecutive indices whose size does not depend on the number of processes
(a forward in batches of another size differs in the last bits, enough to flip a uint8), and the blocks are dealt out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor

from difftrain.batch import Cond, Denoiser, Variance
from difftrain.conditioning import Conditioning
from difftrain.data.transform import to_uint8
from difftrain.distributed import num_processes, process_index
from difftrain.latents import LatentEncoder
from difftrain.parameterization import Parameterization
from difftrain.registry import SAMPLERS, InputError, NonNegative, NonNegativeInt, PositiveInt, UnitInterval
from difftrain.rng import Rng
from difftrain.schedule import NoiseSchedule

Spacing = Literal["trailing", "leading", "linspace"]


class Sampler(Protocol):
    """A diffusers scheduler of a kind: its class, its own settings, and how many steps it takes."""

    steps: int
    flow: ClassVar[bool]  # whether it integrates flow schedules rather than diffusion ones
    class_name: ClassVar[str]

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]: ...


@SAMPLERS.register("ddpm")
@dataclass
class DDPM:
    """x_{t-1} ~ q(x_{t-1} | x_t, x0_hat): ancestral sampling; uses a learned variance if the model has one.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    """

    steps: PositiveInt = 1000
    spacing: Spacing = "trailing"
    flow: ClassVar[bool] = False
    class_name: ClassVar[str] = "DDPMScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        variance = {"variance_type": "learned_range"} if learned_variance else {}
        return {"timestep_spacing": self.spacing, "clip_sample": clip, **variance}


@SAMPLERS.register("ddim")
@dataclass
class DDIM:
    """x_s = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 v) eps_hat + eta sqrt(v) z; eta = 0 is deterministic.

    Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502.
    """

    steps: PositiveInt = 50
    eta: UnitInterval = 0.0
    spacing: Spacing = "trailing"
    flow: ClassVar[bool] = False
    class_name: ClassVar[str] = "DDIMScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        return {"timestep_spacing": self.spacing, "clip_sample": clip, "set_alpha_to_one": True}


@SAMPLERS.register("dpm_solver++")
@dataclass
class DPMSolver:
    """DPM-Solver++ (multistep, on x0_hat).

    Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv:2211.01095.
    """

    steps: PositiveInt = 20
    order: Literal[1, 2, 3] = 2
    spacing: Spacing = "trailing"
    flow: ClassVar[bool] = False
    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        return {"timestep_spacing": self.spacing, "solver_order": self.order, "algorithm_type": "dpmsolver++"}


@SAMPLERS.register("unipc")
@dataclass
class UniPC:
    """Unified predictor-corrector.

    Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", arXiv:2302.04867.
    """

    steps: PositiveInt = 20
    order: PositiveInt = 2
    spacing: Spacing = "trailing"
    flow: ClassVar[bool] = False
    class_name: ClassVar[str] = "UniPCMultistepScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        return {"timestep_spacing": self.spacing, "solver_order": self.order}


@SAMPLERS.register("euler")
@dataclass
class Euler:
    """Euler steps of the probability-flow ODE in sigma / alpha.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, algorithm 1.
    """

    steps: PositiveInt = 30
    spacing: Spacing = "trailing"
    flow: ClassVar[bool] = False
    class_name: ClassVar[str] = "EulerDiscreteScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        return {"timestep_spacing": self.spacing}


@SAMPLERS.register("flow_euler")
@dataclass
class FlowEuler:
    """x_s = x_t + (sigma_s - sigma_t) u_hat on a flow schedule.

    Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", arXiv:2209.03003.
    """

    steps: PositiveInt = 50
    flow: ClassVar[bool] = True
    class_name: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    def options(self, clip: bool, learned_variance: bool) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Sampling:
    """How images are generated: the reverse process, guidance, and the fixed block of samples that goes through it at once.

    prompts: of text-to-image models, taken in turn by the index of the sample; without them captions of the data.
    """

    sampler: Annotated[Any, SAMPLERS]
    guidance: NonNegative = 1.0
    block_size: PositiveInt = 100
    seed: NonNegativeInt = 0
    prompts: list[str] | None = None


def diffusers_scheduler(
    sampler: Sampler, schedule: NoiseSchedule, parameterization: Parameterization, clip: bool, learned_variance: bool = False
) -> Any:
    """The diffusers scheduler with this schedule's noise levels. clip: x0_hat to [-1, 1] where the sampler can (pixels)."""
    import diffusers

    config = dict(schedule.config)
    if not sampler.flow:
        config |= {"prediction_type": parameterization}
    return getattr(diffusers, sampler.class_name)(**config, **sampler.options(clip, learned_variance))


def check_sampler(sampler: Sampler, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    """Refuses what diffusers' schedulers cannot integrate."""
    name = getattr(sampler, "registered_as", (None, type(sampler).__name__))[1]
    if sampler.flow != (schedule.kind == "flow"):
        fitting = "flow_euler" if schedule.kind == "flow" else "ddim"
        raise InputError(f"sampling.sampler: {name} does not integrate a {schedule.kind} schedule; write sampler: {{type: {fitting}}}.")
    if (parameterization == "flow_prediction") != (schedule.kind == "flow"):
        fitting = "flow_prediction" if schedule.kind == "flow" else "epsilon, sample or v_prediction"
        raise InputError(f"parameterization: no sampler takes {parameterization} on a {schedule.kind} schedule; write {fitting}.")
    if sampler.steps > schedule.num_timesteps:
        raise InputError(f"sampling.sampler.steps: {sampler.steps} steps, but the schedule has {schedule.num_timesteps} timesteps; "
                         f"write at most {schedule.num_timesteps}.")


def blocks(num: int, size: int, index: int | None = None, of: int | None = None) -> Iterator[list[int]]:
    """This process's blocks of the indices 0 .. num - 1."""
    index, of = (process_index() if index is None else index), (num_processes() if of is None else of)
    for start in range(index * size, num, of * size):
        yield list(range(start, min(start + size, num)))


class SampleGenerator:
    """Images or clips by index: sample i is the same on any process, in any block layout of equal size, at any time.

    even_sigmas: a flow sampler starts from noise levels evenly spaced before the shift, as diffusers' Flux pipeline gives them, rather than
    from its scheduler's own.
    """

    def __init__(
        self, sampling: Sampling, schedule: NoiseSchedule, parameterization: Parameterization, variance: Variance,
        conditioning: Conditioning, shape: tuple[int, ...], encoder: LatentEncoder | None = None, even_sigmas: bool = False,
    ):
        self.even_sigmas = even_sigmas
        self.sampling, self.schedule, self.parameterization, self.variance = sampling, schedule, parameterization, variance
        self.conditioning, self.shape, self.encoder = conditioning, shape, encoder
        check_sampler(sampling.sampler, schedule, parameterization)
        if sampling.guidance != 1.0 and not conditioning.can_guide:
            raise InputError(f"sampling.guidance: {sampling.guidance} needs a model that was trained with dropped labels. "
                             "Write label_dropout: 0.1 and one more class embedding, or guidance: 1.")

    def with_seed(self, seed: int) -> SampleGenerator:
        """The same process from other noise."""
        other = copy.copy(self)
        other.sampling = dataclasses.replace(self.sampling, seed=seed)
        return other

    @property
    def scheduler(self) -> Any:
        """A fresh diffusers scheduler, as it is also exported."""
        learned = self.variance.output_channels == 2 and self.sampling.sampler.class_name == "DDPMScheduler"
        return diffusers_scheduler(self.sampling.sampler, self.schedule, self.parameterization, self.encoder is None, learned)

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, indices: list[int], device: torch.device, labels: Tensor | None = None) -> Tensor:
        """Pixels [B, C, H, W] or [B, C, F, H, W] uint8 on the CPU; labels [B] default to the classes in turn."""
        if labels is None:
            labels = self.conditioning.labels_of(indices)
        x0 = self._reverse(denoiser, indices, device, labels)
        return to_uint8(self.encoder.decode(x0) if self.encoder is not None else x0).cpu()

    def _reverse(self, denoiser: Denoiser, indices: list[int], device: torch.device, labels: Tensor | None) -> Tensor:
        """The reverse process from pure noise to x0."""
        scheduler = self.scheduler
        scheduler.set_timesteps(device=device, **self._timestep_arguments())
        rng = Rng(self.sampling.seed, 0, indices)
        x = rng.normal(self.shape, "initial").to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        generators, extra = rng.generators("sampler"), self._step_arguments()
        if "generator" in extra:
            extra["generator"] = generators
        cond = self._cond(denoiser, labels, len(x), device)
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = self._predict(denoiser, x_in, t, cond)
            x = scheduler.step(output, t, x, **extra).prev_sample
        return x

    def _timestep_arguments(self) -> dict[str, Any]:
        """How many steps, at which noise levels, and with which shift where it is the resolution's."""
        steps, mu = self.sampling.sampler.steps, self.schedule.log_shift
        sigmas = {"sigmas": [1 - i * (1 - 1 / steps) / max(1, steps - 1) for i in range(steps)]} if self.even_sigmas else {}
        return {"num_inference_steps": steps, **sigmas, **({} if mu is None else {"mu": mu})}

    def _cond(self, denoiser: Denoiser, labels: Tensor | None, num: int, device: torch.device) -> Cond:
        """Conditioning tensors of the samples, and with guidance those of as many samples without; text is encoded here, once."""
        cond = self.conditioning(labels)
        if self.sampling.guidance != 1.0:
            null = self.conditioning.null(num)
            cond = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        cond = {name: value.to(device) for name, value in cond.items()}
        return cast(Any, denoiser).encoded(cond) if hasattr(denoiser, "encoded") else cond

    def _step_arguments(self) -> dict[str, Any]:
        sampler = self.sampling.sampler
        if isinstance(sampler, DDIM):  # at eta = 1 diffusers takes the root of a difference that rounds below 0 where SNR is 0
            return {"eta": min(sampler.eta, 1 - 1e-6), "generator": None}
        return {"generator": None} if isinstance(sampler, DDPM) else {}

    def _predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The (guided) output: uncond + guidance (cond - uncond), with the conditional pass's variance channels."""
        if self.sampling.guidance == 1.0:
            return self._for_scheduler(denoiser(x, t.expand(len(x)), cond), x)
        with_label, without = denoiser(torch.cat([x, x]), t.expand(2 * len(x)), cond).chunk(2)
        channels = x.shape[1]
        guided = without[:, :channels] + self.sampling.guidance * (with_label[:, :channels] - without[:, :channels])
        return self._for_scheduler(torch.cat([guided, with_label[:, channels:]], dim=1), x)

    def _for_scheduler(self, output: Tensor, x: Tensor) -> Tensor:
        prediction, variance = self.variance.split(output.float(), x)
        keeps_variance = variance is not None and self.sampling.sampler.class_name == "DDPMScheduler"
        return output.float() if keeps_variance else prediction


def grid(images: Tensor, columns: int, padding: int = 1) -> Tensor:
    """Images [N, C, H, W] uint8 as one picture [C, H', W'], `columns` wide, on white."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    sheet = torch.full((channels, rows * (height + padding) + padding, columns * (width + padding) + padding), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = padding + (i // columns) * (height + padding), padding + (i % columns) * (width + padding)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def contact_sheet(clips: Tensor) -> Tensor:
    """Clips [N, C, F, H, W] uint8 as one picture [C, H', W']: a row a clip, its frames from left to right."""
    return grid(clips.transpose(1, 2).flatten(0, 1), columns=clips.shape[2])


def to_pil(image: Tensor) -> Any:
    """[C, H, W] uint8, one or three channels, as a Pillow image."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
