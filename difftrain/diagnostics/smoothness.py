"""How evenly images change as the initial noise moves: the metric of Smooth Diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import DIAGNOSTICS, Diagnostic, Result, Subject
from difftrain.diagnostics.gathering import by_sample, json_number, json_numbers, standard_error
from difftrain.diagnostics.reverse_process import descent, last_state
from difftrain.diagnostics.spacing import trailing_timesteps
from difftrain.objective.schedule import expand_like

PARALLEL = 0.9995  # |cos| beyond which slerp's sine is lost to rounding


@DIAGNOSTICS.register("smoothness")
@dataclass(frozen=True)
class Smoothness(Diagnostic):
    """ISTD = mean over prompts of std_k |y_{k+1} - y_k|_2, y_k the image of slerp(z_1, z_2, k / K).

    k = 0 ... K, the number of intervals. 0 is ideal: each interval changes the image by as much.
    Images are floats in [0, 1] and not rounded, the norm is over all pixels and channels and not
    normalised, the std is that of the population (ddof 0): the paper states neither, so values
    compare only at equal protocols and resolutions. Prompt i is the class i mod classes, or
    nothing; each has two noises of its own. Deterministic DDIM with the run's guidance.
    `mean_distance` is the mean of the distances, `by_interval` their mean over prompts: a model
    that ignores its noise is smooth too. `standard_error` is that of `value` over prompts.

    Args:
        num: Prompts; published: 500.
        steps: Steps of DDIM, in diffusers' `trailing` spacing.
        intervals: Intervals between the two noises.
        seed: Seed of the noises.

    Reference:
        Guo et al. 2024, "Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models",
        arXiv:2312.04410 (500 prompts, 10 intervals, 50 steps).
    """

    num: PositiveInt = 100
    steps: PositiveInt = 50
    intervals: PositiveInt = 10
    seed: NonNegativeInt = 0
    needs_images: ClassVar[bool] = True

    def check(self, subject: Subject) -> None:
        """Refuse tensors, and more steps than the schedule has timesteps.

        Raises:
            InputError: If samples are not images, or if there are fewer timesteps.
        """
        super().check(subject)
        trailing_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure the distances. Collective."""
        self.check(subject)
        size = max(1, subject.block_size // (self.intervals + 1))

        def rows(prompts: list[int]) -> Tensor:
            return self._distances(subject, prompts)

        distances = by_sample(self.num, (self.intervals,), size, subject.denoiser, rows)
        stds = distances.std(1, correction=0)
        return {
            "value": float(stds.mean()),
            "standard_error": json_number(standard_error(stds)),
            "mean_distance": float(distances.mean()),
            "by_interval": json_numbers(distances.mean(0)),
            "position": [k / self.intervals for k in range(self.intervals + 1)],
            "protocol": subject.protocol(
                self,
                num_prompts=self.num,
                range="[0, 1]",
                ddof=0,
                norm="L2 over all pixels, not normalised",
                clipped=subject.clips,
                sampler="ddim",
                eta=0,
                steps=self.steps,
                spacing="trailing",
                guidance=subject.guidance,
            ),
        }

    def _distances(self, subject: Subject, prompts: list[int]) -> Tensor:
        """Return the distances [B, intervals] of neighbouring images of some prompts."""
        # The noises between two ends
        rng, num_points = Rng(self.seed, 0, prompts), self.intervals + 1
        z1 = rng.normal(subject.shape, "diagnostics.first").to(subject.device)
        z2 = rng.normal(subject.shape, "diagnostics.second").to(subject.device)
        between = [slerp(z1, z2, k / self.intervals) for k in range(num_points)]
        z = torch.stack(between, dim=1).flatten(0, 1)
        # Their images
        labels = subject.conditioning.labels_of(prompts)
        if labels is not None:
            labels = labels.repeat_interleave(num_points)
        timesteps = trailing_timesteps(subject.schedule.num_timesteps, self.steps)
        x0 = last_state(descent(subject, z, timesteps, labels, "ddim", rng, subject.guidance))
        images = torch.unflatten(subject.pixels(x0), 0, (len(prompts), num_points))
        return adjacent_distances(images)


def adjacent_distances(images: Tensor) -> Tensor:
    """Return |y_{k+1} - y_k|_2 [B, K - 1] float64 of images [B, K, ...]."""
    distances: Tensor = torch.linalg.vector_norm(images.double().diff(dim=1).flatten(2), dim=2)
    return distances


def slerp(a: Tensor, b: Tensor, position: float) -> Tensor:
    """Interpolate as (sin((1 - p) w) a + sin(p w) b) / sin(w), with the angle w between a and b.

    Where they are parallel it is a straight line. Each sample is one vector; lengths are kept.

    Args:
        a: One end [B, ...].
        b: The other end [B, ...].
        position: p in [0, 1].

    Reference:
        Shoemake 1985, "Animating Rotation with Quaternion Curves".
    """
    cos = torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())
    angle = cos.clamp(-1, 1).acos()
    is_parallel = cos.abs() > PARALLEL
    sine = torch.where(is_parallel, 1.0, angle.sin())
    of_a = torch.where(is_parallel, 1 - position, ((1 - position) * angle).sin() / sine)
    of_b = torch.where(is_parallel, position, (position * angle).sin() / sine)
    return expand_like(of_a, a) * a + expand_like(of_b, b) * b
