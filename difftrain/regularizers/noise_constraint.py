"""SmoothVideo's noise constraint: the implied noise of neighbouring frames changes as smoothly as the frames do."""

from typing import Literal

from torch import Tensor

from difftrain.batch import DenoisingPass
from difftrain.registry import REGULARIZERS, InputError, NonNegative, NonNegativeInt, Positive, PositiveInt
from difftrain.regularizers.base import WeightedTerm
from difftrain.schedule import NoiseLevel, NoiseSchedule, expand_like

SCALE = 1000.0


@REGULARIZERS.register("noise_constraint")
class NoiseConstraint(WeightedTerm):
    """mean |d(eps_hat) - d(x_t) C_t / scale|, d(q)_i = 2 q_i - q_{i-1} - q_{i+1}, C_t = alpha_t / (alpha_t sigma_s - alpha_s sigma_t).

    s = t - 1, and i runs over the interior frames. Peng et al. 2023, "Smooth Video Synthesis with Noise Constraints on Diffusion
    Models for One-shot Video Tuning", arXiv:2311.17536; formula, signs and defaults are those of the published code. It rests on
    the DDIM identity eps = C_t (x_s - (alpha_s / alpha_t) x_t): what d(eps_hat) is fixes what d(x_s) will be. The level below t = 0
    is the clean video, alpha 1 and sigma 0. manner `simple` leaves the x_t term out, the limit of scale to infinity. It needs videos
    [B, C, F, H, W] of at least 3 frames. An eps_hat that is linear from frame to frame, with such an x_t, costs nothing.
    """

    def __init__(
        self, weight: NonNegative = 0.2, manner: Literal["full", "simple"] = "full", scale: Positive = SCALE, every: PositiveInt = 1,
        warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        if manner == "simple" and scale != SCALE:
            raise InputError("regularizer noise_constraint: scale divides a term that manner: simple leaves out; leave scale out, "
                             "or write manner: full.")
        self.manner, self.scale = manner, scale

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        if len(shape) != 5:
            raise InputError(f"regularizer noise_constraint compares the frames of videos [B, C, F, H, W], but x0 has the shape "
                             f"{list(shape)}. Give it video data, or leave the regularizer out.")
        if shape[2] < 3:
            raise InputError(f"regularizer noise_constraint needs at least 3 frames, but the videos have {shape[2]}. "
                             "Write num_frames: 3 or more.")

    def forward(self, p: DenoisingPass) -> Tensor:  # [B]
        self.check(p.schedule, tuple(p.x_t.shape))
        difference = second_difference(p.estimate.eps)
        if self.manner == "full":
            slope = coefficient(p.level, p.schedule.level_before(p.t)) / self.scale
            difference = difference - expand_like(slope, p.x_t) * second_difference(p.x_t.detach())
        return difference.abs().flatten(1).mean(1)


def coefficient(level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """C [B] float64, negative: eps = C (x_s - (alpha_s / alpha_t) x_t) along a DDIM step from `level` to `before`; 0 at SNR = 0."""
    return level.alpha / (level.alpha * before.sigma - before.alpha * level.sigma)


def second_difference(q: Tensor) -> Tensor:
    """2 q_i - q_{i-1} - q_{i+1} of the interior frames: [B, C, F, H, W] to [B, C, F - 2, H, W]."""
    before, middle, after = q[:, :, :-2], q[:, :, 1:-1], q[:, :, 2:]
    return 2 * middle - before - after
