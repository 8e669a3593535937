"""Distributions of the timesteps: independent for each sample, or stratified over the global batch.

A sampler that is not uniform may return importance weights, uniform density over its own: the
objective's expectation is then that of uniform t.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegativeInt, Positive
from difftrain.core.rng import Rng
from difftrain.objective.slots import TIMESTEPS
from difftrain.objective.types import Timesteps


def index(u: Tensor, num_timesteps: int) -> Tensor:
    """Return table indices [B] long from u [B] in [0, 1)."""
    return (u * num_timesteps).long().clamp(0, num_timesteps - 1)


def unweighted(t: Tensor) -> Timesteps:
    """Return timesteps [B] with importance 1."""
    return Timesteps(t, torch.ones(len(t), dtype=torch.float64))


@TIMESTEPS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Uniform timesteps: ``t ~ U{0, ..., T-1}``, independent for each sample.

    Reference:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    """

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        """Draw a timestep for each sample."""
        return unweighted(index(rng.uniform("timesteps"), num_timesteps))


@TIMESTEPS.register("stratified")
@dataclass(frozen=True)
class Stratified:
    """Stratified timesteps: ``t = floor(T (p + u) / B)``, p a permutation of 0..B-1, u ~ U[0, 1).

    p is a random order of the global batch of B samples. t is uniform for each sample and spreads
    evenly over every global batch, so the loss varies less from step to step.

    Reference:
        Kingma et al. 2021, "Variational Diffusion Models", arXiv:2107.00630 (low-discrepancy
        sampler; theirs shares one offset u).
    """

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        """Draw a timestep for each sample."""
        place = rng.place_in_batch("timesteps")
        return unweighted(index((place + rng.uniform("timesteps")) / rng.batch_size, num_timesteps))


@TIMESTEPS.register("range")
@dataclass(frozen=True)
class TimestepRange:
    """Timesteps of a range of noise levels: ``t ~ U{first, ..., last}``.

    Args:
        first: The smallest timestep.
        last: The largest timestep.
    """

    first: NonNegativeInt = 0
    last: NonNegativeInt = 999

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise InputError(
                f"timesteps range: first = {self.first} is greater than last = {self.last}. "
                "Write the smaller one as first."
            )

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        """Draw a timestep for each sample."""
        if self.last >= num_timesteps:
            raise InputError(
                f"timesteps range: last = {self.last}, but the schedule has {num_timesteps} "
                f"timesteps. Write last: {num_timesteps - 1} or less."
            )
        return unweighted(self.first + index(rng.uniform("timesteps"), self.last - self.first + 1))


@TIMESTEPS.register("logit_normal")
@dataclass(frozen=True)
class LogitNormal:
    """Logit-normal timesteps: ``t = floor(T sigmoid(mean + std z))``, z ~ N(0, 1).

    Args:
        mean: Location; 0 puts most samples in the middle of the schedule.
        std: Width.
        unbiased: Whether importance weights make the expectation that of uniform t, as an estimate
            with less variance in the middle. Without them, as published, the density is part of the
            objective.

    Reference:
        Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis", arXiv:2403.03206, section 3.1.
    """

    mean: float = 0.0
    std: Positive = 1.0
    unbiased: bool = False

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        """Draw a timestep for each sample."""
        z = rng.normal((), "timesteps").double()
        t = index(torch.sigmoid(self.mean + self.std * z), num_timesteps)
        if not self.unbiased:
            return unweighted(t)
        return Timesteps(t, 1 / (num_timesteps * self.probability(t, num_timesteps)))

    def probability(self, t: Tensor, num_timesteps: int) -> Tensor:
        """Return the probability [B] float64 of drawing each index.

        Args:
            t: Table indices [B], long.
            num_timesteps: T, the length of the schedule's table.
        """
        edges = torch.stack([t, t + 1]).double() / num_timesteps
        below = 0.5 * (1 + torch.erf((torch.logit(edges) - self.mean) / (self.std * math.sqrt(2))))
        return below[1] - below[0]
