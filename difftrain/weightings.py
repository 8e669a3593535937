"""Weight of a sample's squared error by its noise level.

Each is written for the error that its paper uses (`stated_for`); `converted` gives the weight on another
parameterization's error that has the same gradient as a function of x0_hat.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difftrain.batch import Weighting
from difftrain.parameterization import Parameterization, squared_error_scale
from difftrain.registry import WEIGHTINGS, InputError, NonNegative, Positive
from difftrain.schedule import NoiseLevel, NoiseSchedule

SMALLEST = 1e-12  # alpha and sigma are clamped here, so that products of zeros and infinities become their limits


@WEIGHTINGS.register("unit")
@dataclass(frozen=True)
class Unit:
    """w = 1 on whatever error is trained."""

    stated_for: ClassVar[Parameterization | None] = None

    def __call__(self, level: NoiseLevel) -> Tensor:
        return torch.ones_like(level.alpha)


@WEIGHTINGS.register("p2")
@dataclass(frozen=True)
class P2:
    """w = (k + SNR)^-gamma on the epsilon error.

    Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", arXiv:2204.00227.
    gamma = 0 is the plain epsilon loss.
    """

    gamma: NonNegative = 1.0
    k: Positive = 1.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (self.k + level.snr) ** -self.gamma


@WEIGHTINGS.register("debiased")
@dataclass(frozen=True)
class Debiased:
    """w = 1 / sqrt(SNR) on the epsilon error, at most max_weight if that is given.

    Yu et al. 2024, "Unmasking Bias in Diffusion Model Training", arXiv:2310.08442. The published weight has no maximum;
    on a cosine schedule 95 % of it lies in the last tenth of the timesteps, so it wants the linear schedule.
    """

    max_weight: Positive | None = None
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (level.sigma / level.alpha).clamp(max=self.max_weight or float("inf"))


@WEIGHTINGS.register("min_snr")
@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma) / SNR on the epsilon error.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv:2303.09556.
    gamma to infinity is the plain epsilon loss; at SNR = 0 the weight is its limit 1.
    """

    gamma: Positive = 5.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return (self.gamma / level.snr).clamp(max=1.0)


@WEIGHTINGS.register("soft_min_snr")
@dataclass(frozen=True)
class SoftMinSNR:
    """w = gamma / (SNR + gamma) on the epsilon error, which is SNR gamma / (SNR + gamma) on the x0 error.

    Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
    arXiv:2401.11605. gamma to infinity is the plain epsilon loss.
    """

    gamma: Positive = 5.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return self.gamma / (level.snr + self.gamma)


@WEIGHTINGS.register("truncated_snr")
@dataclass(frozen=True)
class TruncatedSNR:
    """w = max(SNR, 1) on the x0 error.

    Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv:2202.00512.
    On the epsilon error this is max(1, 1 / SNR).
    """

    stated_for: ClassVar[Parameterization | None] = "sample"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return level.snr.clamp(min=1.0)


def converted(weighting: Weighting, kind: Parameterization, level: NoiseLevel, smallest: float = SMALLEST) -> Tensor:
    """The weighting as a multiplier of `kind`'s squared error, [B] float64; at either end of a schedule its limit, if it has one."""
    level = NoiseLevel(level.alpha.clamp(min=smallest), level.sigma.clamp(min=smallest))
    stated_for = weighting.stated_for or kind
    return weighting(level) * (squared_error_scale(stated_for, level) / squared_error_scale(kind, level))


def weight_table(weighting: Weighting, kind: Parameterization, schedule: NoiseSchedule) -> Tensor:
    """The weight at each timestep, [T] float64; a weight that diverges on this schedule is refused."""
    level = schedule.level(torch.arange(schedule.num_timesteps))
    weights = converted(weighting, kind, level)
    at_an_end = (level.alpha < SMALLEST) | (level.sigma < SMALLEST)
    farther = converted(weighting, kind, level, 10 * SMALLEST)
    diverging = at_an_end & ~(weights <= 1.000001 * farther)  # still growing on the way to the end: no limit
    if diverging.any():
        t = int(diverging.nonzero()[0])
        snr = "0" if level.alpha[t] < SMALLEST else "infinity"
        name = type(weighting).__name__
        raise InputError(
            f"weighting {name} on the {kind} error grows without bound where SNR = {snr} (t = {t} of this schedule). "
            "Use a schedule without zero terminal SNR, parameterization: v_prediction, or weighting: {type: min_snr}."
        )
    return weights
