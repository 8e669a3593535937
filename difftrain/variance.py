"""Fixed or learned reverse variance: the owner of networks with 2C output channels.

With learned variance the second half of the channels interpolates the log-variance; it is trained by the variational
bound alone, with the mean detached, and no weighting touches that term.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difftrain.batch import Batch
from difftrain.errors import per_sample
from difftrain.parameterization import Estimate
from difftrain.registry import VARIANCES, InputError, NonNegative
from difftrain.schedule import NoiseSchedule, expand_like
from difftrain.transitions import beta, posterior


@VARIANCES.register("fixed")
@dataclass(frozen=True)
class FixedVariance:
    """The output is the prediction; the sampler chooses the reverse variance."""

    output_channels: ClassVar[int] = 1

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        expect_channels(output, x_t, 1, "variance: {type: learned_range}")
        return output, None

    def bound(self, batch: Batch, t: Tensor, x_t: Tensor, estimate: Estimate, predicted: Tensor, schedule: NoiseSchedule) -> Tensor:
        raise AssertionError("a fixed variance has no bound")


@VARIANCES.register("learned_range")
@dataclass(frozen=True)
class LearnedRange:
    """log var = f log beta_t + (1 - f) log beta~_t, f = (v + 1) / 2; adds weight T L_vlb(t), in bits per dimension.

    Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672, L_hybrid. weight
    0.001 is their lambda: T / 1000 times the bound of one timestep. The mean is detached. The last term is the
    likelihood of 8-bit pixels in [-1, 1].
    """

    weight: NonNegative = 0.001
    output_channels: ClassVar[int] = 2

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        expect_channels(output, x_t, 2, "variance: {type: fixed}")
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def bound(self, batch: Batch, t: Tensor, x_t: Tensor, estimate: Estimate, predicted: Tensor, schedule: NoiseSchedule) -> Tensor:
        """[B]: KL(q(x_{t-1} | x_t, x0), p), at t = 0 the decoder's negative log-likelihood, mean over dimensions, in bits, scaled."""
        x0, x_t, x0_hat, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (batch.x0, x_t, estimate.x0.detach(), predicted))
        level, before = schedule.level(t), schedule.level_before(t)
        smallest = expand_like(self._log_posterior_variance(t, schedule), x0)
        largest = expand_like(beta(level, before).log(), x0)
        f = (v + 1) / 2
        log_variance = f * largest + (1 - f) * smallest
        mean = posterior(x0_hat, x_t, level, before).mean
        kl = normal_kl(posterior(x0, x_t, level, before).mean, smallest, mean, log_variance)
        nll = -pixel_log_likelihood(x0, mean, log_variance / 2)
        nats = torch.where(expand_like(t == 0, x0) > 0, nll, kl)
        return self.weight * schedule.num_timesteps * per_sample(nats) / math.log(2)

    @staticmethod
    def _log_posterior_variance(t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log beta~_t [B]; at t = 0, where it is 0, that of t = 1."""
        t = t.clamp(min=1)
        level, before = schedule.level(t), schedule.level_before(t)
        return (beta(level, before) * before.sigma**2 / level.sigma**2).log()


def expect_channels(output: Tensor, x_t: Tensor, times: int, other: str) -> None:
    channels = x_t.shape[1]
    if output.shape[1] == times * channels:
        return
    remedy = f"write {other}" if output.shape[1] == (3 - times) * channels else f"build the model with out_channels: {times * channels}"
    raise InputError(f"the model returns {output.shape[1]} channels for an input of {channels}, expected {times * channels}; {remedy}.")


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of two diagonal Gaussians by element, in nats."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def pixel_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Gaussian's mass on the bin of half width 1/255 around x0; the outermost bins reach to infinity."""
    scale = torch.exp(-log_std)
    below, above = (normal_cdf(scale * (x0 - mean + shift)) for shift in (-1 / 255, 1 / 255))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that the published bounds were computed with (error up to 3e-4)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
