"""Weights of a sample's squared error by its noise level, and their conversion.

Each weighting is written for the error that its paper uses (`stated_for`). `converted` returns the
weight on a different parameterization's error that has the same gradient as a function of x0_hat.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegative, Positive, registered_name
from difftrain.objective.parameterization import Parameterization, squared_error_scale
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule
from difftrain.objective.slots import WEIGHTINGS, Weighting

# alpha and sigma are clamped here, so that products of zeros and infinities become their limits.
SMALLEST = 1e-12


@WEIGHTINGS.register("unit")
@dataclass(frozen=True)
class Unit:
    """No weighting: ``w = 1`` on whichever error is trained."""

    stated_for: ClassVar[Parameterization | None] = None

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return torch.ones_like(level.alpha)


@WEIGHTINGS.register("p2")
@dataclass(frozen=True)
class P2:
    """Perception-prioritized (P2) weighting: ``w = (k + SNR)^-gamma`` on the epsilon error.

    gamma = 0 is the plain epsilon loss.

    Args:
        gamma: Strength of the down-weighting of low noise levels.
        k: Keeps the weight finite at SNR = 0.

    Reference:
        Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", arXiv:2204.00227.
    """

    gamma: NonNegative = 1.0
    k: Positive = 1.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return (self.k + level.snr) ** -self.gamma


@WEIGHTINGS.register("debiased")
@dataclass(frozen=True)
class Debiased:
    """Debiased weighting: ``w = 1 / sqrt(SNR)`` on the epsilon error, at most max_weight.

    On a cosine schedule 95 % of the weight lies in the last tenth of the timesteps, so it is used
    with the linear schedule.

    Args:
        max_weight: The largest weight. The published one has no maximum.

    Reference:
        Yu et al. 2024, "Unmasking Bias in Diffusion Model Training", arXiv:2310.08442.
    """

    max_weight: Positive | None = None
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return (level.sigma / level.alpha).clamp(max=self.max_weight or math.inf)


@WEIGHTINGS.register("min_snr")
@dataclass(frozen=True)
class MinSNR:
    """Min-SNR weighting: ``w = min(SNR, gamma) / SNR`` on the epsilon error.

    As gamma goes to infinity it is the plain epsilon loss. At SNR = 0 the weight is its limit 1.

    Args:
        gamma: The SNR above which samples are weighted down.

    Reference:
        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy",
        arXiv:2303.09556.
    """

    gamma: Positive = 5.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return (self.gamma / level.snr).clamp(max=1.0)


@WEIGHTINGS.register("soft_min_snr")
@dataclass(frozen=True)
class SoftMinSNR:
    """Soft min-SNR weighting: ``w = gamma / (SNR + gamma)`` on the epsilon error.

    On the x0 error this is ``SNR gamma / (SNR + gamma)``. As gamma goes to infinity it is the plain
    epsilon loss.

    Args:
        gamma: The SNR around which samples are weighted down.

    Reference:
        Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass
        Diffusion Transformers", arXiv:2401.11605.
    """

    gamma: Positive = 5.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return self.gamma / (level.snr + self.gamma)


@WEIGHTINGS.register("truncated_snr")
@dataclass(frozen=True)
class TruncatedSNR:
    """Truncated SNR weighting: ``w = max(SNR, 1)`` on the x0 error.

    On the epsilon error this is ``max(1, 1 / SNR)``.

    Reference:
        Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
        arXiv:2202.00512.
    """

    stated_for: ClassVar[Parameterization | None] = "sample"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return level.snr.clamp(min=1.0)


def converted(
    weighting: Weighting, kind: Parameterization, level: NoiseLevel, smallest: float = SMALLEST
) -> Tensor:
    """Return a weighting as the multiplier of a parameterization's squared error.

    Args:
        weighting: The weighting, for the error that it is stated for.
        kind: The parameterization whose error is trained.
        level: Noise levels [B].
        smallest: alpha and sigma are clamped to it, so that the weight at an end of a schedule is
            its limit, if it has one.

    Returns:
        [B], float64.
    """
    level = NoiseLevel(level.alpha.clamp(min=smallest), level.sigma.clamp(min=smallest))
    stated_for = weighting.stated_for or kind
    ratio = squared_error_scale(stated_for, level) / squared_error_scale(kind, level)
    return weighting(level) * ratio


def weight_table(weighting: Weighting, kind: Parameterization, schedule: NoiseSchedule) -> Tensor:
    """Return the weight of a parameterization's error at each timestep, [T] float64.

    Args:
        weighting: The weighting.
        kind: The parameterization whose error is trained.
        schedule: The noise schedule.

    Raises:
        InputError: If a weight diverges, is not finite, or is negative.
    """
    level = schedule.level(torch.arange(schedule.num_timesteps))
    weights = converted(weighting, kind, level)
    name = repr(registered_name(weighting))

    # A weight that still grows on the way to SNR = 0 or infinity has no limit there.
    at_an_end = (level.alpha < SMALLEST) | (level.sigma < SMALLEST)
    farther = converted(weighting, kind, level, 10 * SMALLEST)
    diverging = at_an_end & ~(weights <= 1.000001 * farther)
    if diverging.any():
        t = int(diverging.nonzero()[0])
        snr, remedy = "infinity", "with noise at every timestep"
        if level.alpha[t] < SMALLEST:
            snr, remedy = "0", "without zero terminal SNR"
        raise InputError(
            f"weighting {name} on the {kind} error grows without bound where SNR = {snr} "
            f"(t = {t} of this schedule). Use a schedule {remedy}, "
            "parameterization: v_prediction, or weighting: {type: min_snr}."
        )

    wrong = ~((weights >= 0) & weights.isfinite())
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise InputError(
            f"weighting {name} on the {kind} error is {weights[t].item():.4g} at t = {t}, where "
            f"SNR = {level.snr[t].item():.4g}. A weight must be finite and not negative: bound it "
            "there, or use weighting: {type: min_snr}."
        )
    return weights


def weight_curve(
    weights: Tensor, kind: Parameterization, schedule: NoiseSchedule, most: int = 200
) -> dict[str, Any]:
    """Return a table of weights as plain data for a chart.

    Args:
        weights: The weights [T] of `kind`'s error.
        kind: The parameterization whose error is trained.
        schedule: The noise schedule.
        most: The largest number of timesteps. Both ends are among them.

    Returns:
        trained_error, and lists over timesteps: t, log_snr, weight, and weight_on_epsilon, the
        weight on the epsilon error with the same gradient. Numbers that are not finite are None,
        because JSON has no infinity.
    """
    count = min(len(weights), most)
    t = torch.linspace(0, len(weights) - 1, count, dtype=torch.float64).round().long()
    level, weight = schedule.level(t), weights[t]
    on_x0 = weight * squared_error_scale(kind, level)
    return {
        "trained_error": kind,
        "t": t.tolist(),
        "log_snr": finite_or_none(level.log_snr),
        "weight": finite_or_none(weight),
        "weight_on_epsilon": finite_or_none(on_x0 / squared_error_scale("epsilon", level)),
    }


def finite_or_none(values: Tensor) -> list[float | None]:
    """Return numbers [n] as a list, with None for those that are not finite."""
    found: list[float | None] = values.tolist()
    for i in (~values.isfinite()).nonzero().flatten().tolist():
        found[i] = None
    return found
