"""How evenly images change as the initial noise moves: the interpolation metric of Smooth Diffusion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import (
    DIAGNOSTICS,
    Result,
    Subject,
    by_sample,
    plain,
    trailing_timesteps,
)
from difftrain.diagnostics.reverse_process import descent, end_of
from difftrain.objective.schedule import expand_like

PARALLEL = 0.9995  # |cos| beyond which slerp's sine is lost to rounding


@DIAGNOSTICS.register("smoothness")
@dataclass(frozen=True)
class Smoothness:
    """ISTD = mean over prompts of std_k |y_{k+1} - y_k|_2, y_k the image of slerp(z_1, z_2, k / intervals), k = 0 ... intervals.

    Guo et al. 2024, "Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models", arXiv:2312.04410 (500 prompts, 10 intervals,
    50 steps). 0 is ideal: each interval changes the image by as much. Images are floats in [0, 1] and not rounded, the norm is over all
    pixels and channels and not normalised, the std is that of the population (ddof 0): the paper states neither, so values compare only
    at equal protocols and resolutions. Prompt i is the class i mod classes, or nothing; each has two noises of its own. Deterministic
    DDIM with the run's guidance. `mean_distance` is the mean of the distances, `by_interval` their mean over prompts: a model that
    ignores its noise is smooth too. `standard_error` is that of `value` over prompts.
    """

    num: PositiveInt = 100
    steps: PositiveInt = 50
    intervals: PositiveInt = 10
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        trailing_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        size = max(1, subject.block_size // (self.intervals + 1))
        distances = by_sample(
            self.num, (self.intervals,), size, lambda prompts: self.distances(subject, prompts)
        )
        stds = distances.std(1, correction=0)
        error = float(stds.std() / self.num**0.5) if self.num > 1 else None
        return {
            "value": float(stds.mean()), "standard_error": error, "mean_distance": float(distances.mean()),
            "by_interval": plain(distances.mean(0)), "position": [k / self.intervals for k in range(self.intervals + 1)],
            "protocol": subject.protocol(
                self, num_prompts=self.num, range="[0, 1]", ddof=0, norm="L2 over all pixels, not normalised", clipped=subject.clips,
                sampler="ddim", eta=0, steps=self.steps, spacing="trailing", guidance=subject.guidance,
            ),
        }  # fmt: skip

    def distances(self, subject: Subject, prompts: list[int]) -> Tensor:
        """[B, intervals]."""
        rng, points = Rng(self.seed, 0, prompts), self.intervals + 1
        z1, z2 = (
            rng.normal(subject.shape, f"diagnostics.{name}").to(subject.device)
            for name in ("first", "second")
        )
        z = torch.stack([slerp(z1, z2, k / self.intervals) for k in range(points)], dim=1).flatten(
            0, 1
        )
        labels = subject.conditioning.labels_of(prompts)
        labels = labels.repeat_interleave(points) if labels is not None else None
        timesteps = trailing_timesteps(subject.schedule.num_timesteps, self.steps)
        x0 = end_of(descent(subject, z, timesteps, labels, "ddim", rng, subject.guidance))
        return adjacent_distances(subject.pixels(x0).unflatten(0, (len(prompts), points)))


def adjacent_distances(images: Tensor) -> Tensor:
    """|y_{k+1} - y_k|_2 [B, K - 1] float64 of images [B, K, ...]."""
    return images.double().diff(dim=1).flatten(2).norm(dim=2)


def slerp(a: Tensor, b: Tensor, position: float) -> Tensor:
    """(sin((1 - p) w) a + sin(p w) b) / sin(w), w the angle between a and b of each sample; a straight line where they are parallel.

    Shoemake 1985, "Animating Rotation with Quaternion Curves". Each sample [B, ...] is one vector; lengths are kept as they are.
    """
    cos = torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())
    angle = cos.clamp(-1, 1).acos()
    parallel = cos.abs() > PARALLEL
    sine = torch.where(parallel, 1.0, angle.sin())
    of_a = torch.where(parallel, 1 - position, ((1 - position) * angle).sin() / sine)
    of_b = torch.where(parallel, position, (position * angle).sin() / sine)
    return expand_like(of_a, a) * a + expand_like(of_b, b) * b
