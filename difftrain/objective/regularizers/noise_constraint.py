"""Noise constraint of SmoothVideo."""

from typing import Literal

from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegative, NonNegativeInt, Positive, PositiveInt
from difftrain.objective.losses import per_sample
from difftrain.objective.regularizers.base import WeightedTerm
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.types import DenoisingPass

SCALE = 1000.0


@REGULARIZERS.register("noise_constraint")
class NoiseConstraint(WeightedTerm):
    """Video noise constraint: ``mean |d(eps_hat) - d(x_t) C_t / scale|``, over interior frames i.

    ``d(q)_i = 2 q_i - q_{i-1} - q_{i+1}`` is the second difference in time, and
    ``C_t = alpha_t / (alpha_t sigma_s - alpha_s sigma_t)`` with s = t - 1. The noise that the
    output implies then changes from frame to frame as smoothly as the frames do. The term rests on
    the DDIM identity ``eps = C_t (x_s - (alpha_s / alpha_t) x_t)``: d(eps_hat) determines d(x_s).
    The level below t = 0 is the clean video, with alpha 1 and sigma 0. An eps_hat that is linear
    from frame to frame, with such an x_t, costs nothing.

    It needs videos [B, C, F, H, W] of at least 3 frames.

    Args:
        weight: Factor of the term.
        manner: "simple" leaves out the x_t term, which is the limit of an infinite scale.
        scale: Divides the x_t term.
        every: The term is evaluated at each k-th step, with k times its weight.
        warmup: Steps over which the weight grows linearly to its full value.

    Reference:
        Peng et al. 2023, "Smooth Video Synthesis with Noise Constraints on Diffusion Models for
        One-shot Video Tuning", arXiv:2311.17536. Formula, signs and defaults are those of the
        published code.
    """

    def __init__(
        self,
        weight: NonNegative = 0.2,
        manner: Literal["full", "simple"] = "full",
        scale: Positive = SCALE,
        every: PositiveInt = 1,
        warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        if manner == "simple" and scale != SCALE:
            raise InputError(
                "regularizer noise_constraint: scale divides the x_t term, which manner: simple "
                "leaves out. Leave scale out, or write manner: full."
            )
        self.manner, self.scale = manner, scale

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Check that x0 is a video of at least 3 frames."""
        if len(shape) != 5:
            raise InputError(
                "regularizer noise_constraint compares the frames of videos [B, C, F, H, W], but "
                f"x0 has the shape {list(shape)}. Write video data, or leave the regularizer out."
            )
        if shape[2] < 3:
            raise InputError(
                "regularizer noise_constraint needs at least 3 frames, but the videos have "
                f"{shape[2]}. Write num_frames: 3 or more."
            )

    def forward(self, p: DenoisingPass) -> Tensor:  # [B]
        """Return the mean of each video [B]."""
        self.check(p.schedule, tuple(p.x_t.shape))
        difference = second_difference(p.estimate.eps)
        if self.manner == "full":
            slope = coefficient(p.level, p.schedule.level_before(p.t)) / self.scale
            difference = difference - expand_like(slope, p.x_t) * second_difference(p.x_t.detach())
        return per_sample(difference.abs())


def coefficient(level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """Return C [B] float64 of ``eps = C (x_s - (alpha_s / alpha_t) x_t)`` along a DDIM step.

    It is negative, and 0 at SNR = 0.

    Args:
        level: Noise levels [B] at t.
        before: Noise levels [B] at s < t.
    """
    return level.alpha / (level.alpha * before.sigma - before.alpha * level.sigma)


def second_difference(q: Tensor) -> Tensor:
    """Return 2 q_i - q_{i-1} - q_{i+1} of the interior frames.

    Args:
        q: Videos [B, C, F, H, W].

    Returns:
        [B, C, F - 2, H, W].
    """
    before, middle, after = q[:, :, :-2], q[:, :, 1:-1], q[:, :, 2:]
    return 2 * middle - before - after
