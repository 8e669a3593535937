"""Generators over data whose optimal denoiser is known in closed form."""

from typing import Any

import torch
from torch import Tensor

from difftrain.generation.generator import SampleGenerator, Sampling
from difftrain.generation.samplers import Sampler
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.models.model import ItemKind
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond
from difftrain.objective.variance import FixedVariance
from helpers.support import Gaussian

CPU = torch.device("cpu")
DATA = Gaussian(mean=0.1, std=0.25)  # within [-1, 1], so that clipping x0 to it changes nothing
LINEAR = NoiseSchedule.linear()
COSINE = NoiseSchedule.cosine()
FLOW = NoiseSchedule.flow(shift=2.0)
ZERO_TERMINAL = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
DIFFUSION_KINDS: list[Parameterization] = ["epsilon", "sample", "v_prediction"]
UNLABELLED = ClassConditioning(None, None)


class Optimal:
    """The optimal denoiser of DATA as a float32 network.

    Its time is the index in the table, and T sigma in flow models.
    """

    def __init__(self, kind: Parameterization, schedule: NoiseSchedule):
        self.kind: Parameterization = kind
        self.schedule = schedule

    def level(self, time: Tensor) -> NoiseLevel:
        """Return the noise level of a time [B]."""
        if self.schedule.kind == "flow":
            sigma = time.double() / self.schedule.num_timesteps
            return NoiseLevel(1 - sigma, sigma)
        return self.schedule.level(time.long())

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return E[target | x]."""
        return DATA.conditional_mean(self.kind, x.double(), self.level(time)).float()


def generator(
    sampler: Sampler,
    schedule: NoiseSchedule = LINEAR,
    kind: Parameterization = "epsilon",
    shape: tuple[int, ...] = (1, 16, 16),
    conditioning: Conditioning = UNLABELLED,
    variance: Variance | None = None,
    items: ItemKind = "images",
    spaces_sigmas_evenly: bool = False,
    **settings: Any,
) -> SampleGenerator:
    """Return a generator.

    Args:
        settings: Further arguments of `Sampling`.
    """
    return SampleGenerator(
        Sampling(sampler=sampler, **settings),
        schedule,
        kind,
        variance or FixedVariance(),
        conditioning,
        shape,
        spaces_sigmas_evenly=spaces_sigmas_evenly,
        items=items,
    )


def generated(
    sampler: Sampler,
    schedule: NoiseSchedule = LINEAR,
    kind: Parameterization = "epsilon",
    num: int = 64,
    **settings: Any,
) -> Tensor:
    """Return x0 of samples 0 to num - 1, before they become pixels."""
    made = generator(sampler, schedule, kind, **settings)
    return made._reverse(Optimal(kind, schedule), list(range(num)), CPU, None)
