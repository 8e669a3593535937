"""Weightings of kohya-ss's sd-scripts, for runs that must match that trainer; none is a paper's.

An output for which sd-scripts has no such option trains the weight converted, as with every
weighting.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from difftrain.core.registry import NonNegative
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseLevel
from difftrain.objective.slots import WEIGHTINGS

# sd-scripts clamps the SNR against infinity. The first timesteps of a schedule often lie above.
LARGEST_SNR = 1000.0


def clamped_snr(level: NoiseLevel) -> Tensor:
    """Return the SNR [B] as sd-scripts uses it."""
    return level.snr.clamp(max=LARGEST_SNR)


@WEIGHTINGS.register("kohya_debiased")
@dataclass(frozen=True)
class KohyaDebiased:
    """kohya's debiased weighting: ``w = 1 / sqrt(min(SNR, 1000))`` on the epsilon error.

    It is `debiased` up to SNR = 1000. On v sd-scripts does something else, `kohya_debiased_v`.

    Reference:
        kohya-ss 2023, sd-scripts, option debiased_estimation_loss of an epsilon model.
    """

    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return clamped_snr(level) ** -0.5


@WEIGHTINGS.register("kohya_debiased_v")
@dataclass(frozen=True)
class KohyaDebiasedV:
    """kohya's debiased weighting of v: ``w = 1 / (min(SNR, 1000) + 1)`` on the v error.

    Up to SNR = 1000 this is the plain x0 error. The paper's weight (`debiased`) is
    ``sqrt(SNR) / (SNR + 1)`` on the v error.

    Reference:
        kohya-ss 2024, sd-scripts, option debiased_estimation_loss of a v model.
    """

    stated_for: ClassVar[Parameterization | None] = "v_prediction"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return 1 / (clamped_snr(level) + 1)


@WEIGHTINGS.register("kohya_scaled_v")
@dataclass(frozen=True)
class KohyaScaledV:
    """kohya's scaled v weighting: ``w = min(SNR, 1000) / (min(SNR, 1000) + 1)`` on the v error.

    Up to SNR = 1000 this is the plain epsilon error.

    Reference:
        kohya-ss 2023, sd-scripts, option scale_v_pred_loss_like_noise_pred.
    """

    stated_for: ClassVar[Parameterization | None] = "v_prediction"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        snr = clamped_snr(level)
        # Not 1 - 1 / (snr + 1), which cancels: at SNR = 0 the limit on the epsilon error is 1.
        return snr / (snr + 1)


@WEIGHTINGS.register("kohya_v_pred_like")
@dataclass(frozen=True)
class KohyaVPredLike:
    """kohya's v-like weighting: ``w = 1 + scale (1 + 1 / min(SNR, 1000))`` on the epsilon error.

    Up to SNR = 1000 this is the epsilon error plus scale times the v error. scale = 0 is the plain
    epsilon loss.

    Args:
        scale: Factor of the v error, the number of sd-scripts' option.

    Reference:
        kohya-ss 2023, sd-scripts, option v_pred_like_loss, which sd-scripts does not allow for v.
    """

    scale: NonNegative = 1.0
    stated_for: ClassVar[Parameterization | None] = "epsilon"

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B]."""
        return 1 + self.scale * (1 + 1 / clamped_snr(level))
