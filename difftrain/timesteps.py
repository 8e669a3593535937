"""How t is drawn for each sample: keyed by sample, or stratified over the global batch.

A sampler that does not draw uniformly may return importance weights (uniform density over its own), with which the
objective's expectation is that of uniform t.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.batch import Timesteps
from difftrain.registry import TIMESTEPS, InputError, NonNegativeInt, Positive
from difftrain.rng import Rng


def index(u: Tensor, num_timesteps: int) -> Tensor:
    """u in [0, 1) as a table index, [B] long."""
    return (u * num_timesteps).long().clamp(0, num_timesteps - 1)


def unweighted(t: Tensor) -> Timesteps:
    return Timesteps(t, torch.ones(len(t), dtype=torch.float64))


@TIMESTEPS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """t ~ U{0, ..., T-1}, independent for each sample.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
    """

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        return unweighted(index(rng.uniform("timesteps"), num_timesteps))


@TIMESTEPS.register("stratified")
@dataclass(frozen=True)
class Stratified:
    """t = floor(T (p + u) / B), p a random permutation of the global batch 0..B-1, u ~ U[0, 1).

    Uniform for each sample, and spread evenly over every global batch: less variance of the loss from step to step.
    Kingma et al. 2021, "Variational Diffusion Models", arXiv:2107.00630 (low-discrepancy sampler; there one offset is shared).
    """

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        place = rng.place_in_batch("timesteps")
        return unweighted(index((place + rng.uniform("timesteps")) / rng.batch_size, num_timesteps))


@TIMESTEPS.register("range")
@dataclass(frozen=True)
class TimestepRange:
    """t ~ U{first, ..., last}: training restricted to a range of noise levels."""

    first: NonNegativeInt = 0
    last: NonNegativeInt = 999

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise InputError(f"timesteps range: first = {self.first} lies above last = {self.last}; write the smaller one as first.")

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        if self.last >= num_timesteps:
            raise InputError(f"timesteps range: last = {self.last}, but the schedule has {num_timesteps} timesteps; "
                             f"write last: {num_timesteps - 1} or less.")
        return unweighted(self.first + index(rng.uniform("timesteps"), self.last - self.first + 1))


@TIMESTEPS.register("logit_normal")
@dataclass(frozen=True)
class LogitNormal:
    """t = floor(T sigmoid(mean + std z)), z ~ N(0, 1).

    Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv:2403.03206, section 3.1.
    unbiased: importance weights make the expectation that of uniform t (as an estimate with less variance in the
    middle); without them, as published, the density is part of the objective.
    """

    mean: float = 0.0
    std: Positive = 1.0
    unbiased: bool = False

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        t = index(torch.sigmoid(self.mean + self.std * rng.normal((), "timesteps").double()), num_timesteps)
        return Timesteps(t, 1 / (num_timesteps * self.probability(t, num_timesteps))) if self.unbiased else unweighted(t)

    def probability(self, t: Tensor, num_timesteps: int) -> Tensor:
        """Probability [B] of drawing index t, float64."""
        edges = torch.stack([t, t + 1]).double() / num_timesteps
        below = 0.5 * (1 + torch.erf((torch.logit(edges) - self.mean) / (self.std * math.sqrt(2))))
        return below[1] - below[0]
