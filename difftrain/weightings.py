"""Weight of a sample's squared error by its noise level.

Each is written for the error that its paper uses (`stated_for`); `converted` gives the weight on another
parameterization's error that has the same gradient as a function of x0_hat. The weights named kohya_ are those of one
trainer, for runs that must match its; none of them is a paper's.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.batch import Weighting
from difftrain.parameterization import Parameterization, squared_error_scale
from difftrain.registry import WEIGHTINGS, InputError, NonNegative, Positive
from difftrain.schedule import NoiseLevel, NoiseSchedule

SMALLEST = 1e-12  # alpha and sigma are clamped here, so that products of zeros and infinities become their limits
KOHYA_LARGEST_SNR = 1000.0  # sd-scripts cuts the SNR here against an infinite one; a schedule's first timesteps often lie above


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


@WEIGHTINGS.register("kohya_debiased")
@dataclass(frozen=True)
class KohyaDebiased:
    """w = 1 / sqrt(min(SNR, 1000)) on the epsilon error.

    kohya-ss 2023, sd-scripts, option debiased_estimation_loss of an epsilon model. It is `debiased` up to SNR = 1000 and
    1 / sqrt(1000) from there on. Other outputs train it converted, as with every weighting: for v that is not what
    sd-scripts does, which is kohya_debiased_v.
    """

    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return level.snr.clamp(max=KOHYA_LARGEST_SNR) ** -0.5


@WEIGHTINGS.register("kohya_debiased_v")
@dataclass(frozen=True)
class KohyaDebiasedV:
    """w = 1 / (min(SNR, 1000) + 1) on the v error.

    kohya-ss 2024, sd-scripts, option debiased_estimation_loss of a v model. Up to SNR = 1000 this is the plain x0 error,
    not the paper's weight (`debiased`, which on the v error is sqrt(SNR) / (SNR + 1)). Other outputs train it converted.
    """

    stated_for: ClassVar[Parameterization | None] = "v_prediction"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return 1 / (level.snr.clamp(max=KOHYA_LARGEST_SNR) + 1)


@WEIGHTINGS.register("kohya_scaled_v")
@dataclass(frozen=True)
class KohyaScaledV:
    """w = min(SNR, 1000) / (min(SNR, 1000) + 1) on the v error.

    kohya-ss 2023, sd-scripts, option scale_v_pred_loss_like_noise_pred. Up to SNR = 1000 this is the plain epsilon error.
    Other outputs train it converted; sd-scripts has it for v alone.
    """

    stated_for: ClassVar[Parameterization | None] = "v_prediction"

    def __call__(self, level: NoiseLevel) -> Tensor:
        snr = level.snr.clamp(max=KOHYA_LARGEST_SNR)
        return snr / (snr + 1)  # not 1 - 1 / (snr + 1): at SNR = 0 its limit on the epsilon error is 1


@WEIGHTINGS.register("kohya_v_pred_like")
@dataclass(frozen=True)
class KohyaVPredLike:
    """w = 1 + scale (1 + 1 / min(SNR, 1000)) on the epsilon error.

    kohya-ss 2023, sd-scripts, option v_pred_like_loss, whose number is the scale. Up to SNR = 1000 this is the epsilon error
    and scale times the v error; scale = 0 is the plain epsilon loss. Other outputs train it converted; sd-scripts refuses v.
    """

    scale: NonNegative = 1.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        return 1 + self.scale * (1 + 1 / level.snr.clamp(max=KOHYA_LARGEST_SNR))


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
    name = type(weighting).__name__
    if diverging.any():
        t = int(diverging.nonzero()[0])
        snr, bounded = ("0", "without zero terminal SNR") if level.alpha[t] < SMALLEST else ("infinity", "with noise at every timestep")
        raise InputError(
            f"weighting {name} on the {kind} error grows without bound where SNR = {snr} (t = {t} of this schedule). "
            f"Use a schedule {bounded}, parameterization: v_prediction, or weighting: {{type: min_snr}}."
        )
    wrong = ~((weights >= 0) & weights.isfinite())
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise InputError(
            f"weighting {name} on the {kind} error is {weights[t].item():.4g} at t = {t}, where SNR = {level.snr[t].item():.4g}. "
            "A weight must be finite and not negative: bound it there, or use weighting: {type: min_snr}."
        )
    return weights


def weight_curve(weights: Tensor, kind: Parameterization, schedule: NoiseSchedule, most: int = 200) -> dict[str, Any]:
    """The table of weights [T] on kind's error for a chart, as plain lists over at most `most` timesteps, both ends among them.

    Keys: trained_error, t, log_snr, weight, and weight_on_epsilon = weight |error of kind|^2 / |error of epsilon|^2. Where alpha
    or sigma is 0, log_snr and weight_on_epsilon are None, for JSON has no infinity.
    """
    t = torch.linspace(0, len(weights) - 1, min(len(weights), most), dtype=torch.float64).round().long()
    level, weight = schedule.level(t), weights[t]
    on_epsilon = weight * squared_error_scale(kind, level) / squared_error_scale("epsilon", level)
    columns = {"log_snr": level.log_snr, "weight": weight, "weight_on_epsilon": on_epsilon}
    plain = {name: [value if math.isfinite(value) else None for value in column.tolist()] for name, column in columns.items()}
    return {"trained_error": kind, "t": t.tolist(), **plain}
