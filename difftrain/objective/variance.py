"""Fixed or learned variance of the reverse process, which decides the number of output channels.

A learned variance is the second half of the channels. It interpolates the log-variance between its
two extremes. Only the variational bound trains it, with a detached mean and without a weighting.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegative
from difftrain.objective.losses import per_sample
from difftrain.objective.parameterization import Estimate
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.slots import VARIANCES
from difftrain.objective.transitions import beta, posterior, posterior_variance
from difftrain.objective.types import Batch


@VARIANCES.register("fixed")
@dataclass(frozen=True)
class FixedVariance:
    """Fixed variance: ``output = prediction``; the sampler chooses the reverse variance."""

    output_channels: ClassVar[int] = 1

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, C, ...], and None."""
        check_channels(output, x_t, 1, "variance: {type: learned_range}")
        return output, None

    def bound(
        self,
        batch: Batch,
        t: Tensor,
        x_t: Tensor,
        estimate: Estimate,
        predicted: Tensor,
        schedule: NoiseSchedule,
    ) -> Tensor:
        """Fail: nothing predicts the variance, so there is no bound to train."""
        raise AssertionError("a fixed variance has no bound")

    def log_variance(self, predicted: Tensor, level: NoiseLevel, before: NoiseLevel) -> Tensor:
        """Fail: nothing predicts the variance."""
        raise AssertionError("a fixed variance is not predicted")


@VARIANCES.register("learned_range")
@dataclass(frozen=True)
class LearnedRange:
    """Learned variance: ``log var = f log beta_t + (1 - f) log beta~_t``, ``f = (v + 1) / 2``.

    v is the second half of the output's channels, and beta~_t the variance of the posterior. The
    loss gains ``weight T L_vlb(t)`` in bits per dimension, the paper's hybrid loss. The mean is
    detached. At t = 0 the bound is the negative log-likelihood of 8-bit pixels in [-1, 1].

    Args:
        weight: Factor of the bound. The paper's lambda is 0.001: T / 1000 times the bound of one
            timestep.

    Reference:
        Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
        arXiv:2102.09672.
    """

    weight: NonNegative = 0.001
    output_channels: ClassVar[int] = 2

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the prediction and v, both [B, C, ...]."""
        check_channels(output, x_t, 2, "variance: {type: fixed}")
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def bound(
        self,
        batch: Batch,
        t: Tensor,
        x_t: Tensor,
        estimate: Estimate,
        predicted: Tensor,
        schedule: NoiseSchedule,
    ) -> Tensor:
        """Return the weighted bound [B] in bits, averaged over dimensions.

        It is KL(q(x_{t-1} | x_t, x0), p), and at t = 0 the decoder's negative log-likelihood.
        """
        x0, x_t, v = widened(batch.x0), widened(x_t), widened(predicted)
        x0_hat = widened(estimate.x0.detach())
        level, before = schedule.level(t), schedule.level_before(t)

        # The log-variance, between that of the posterior and that of a forward step.
        smallest = expand_like(self._log_posterior_variance(t, schedule), x0)
        largest = expand_like(beta(level, before).log(), x0)
        log_variance = interpolated(v, smallest, largest)

        mean = posterior(x0_hat, x_t, level, before).mean
        kl = normal_kl(posterior(x0, x_t, level, before).mean, smallest, mean, log_variance)
        nll = -pixel_log_likelihood(x0, mean, log_variance / 2)
        nats = torch.where(expand_like(t == 0, x0) > 0, nll, kl)
        return self.weight * schedule.num_timesteps * per_sample(nats) / math.log(2)

    def log_variance(self, predicted: Tensor, level: NoiseLevel, before: NoiseLevel) -> Tensor:
        """Return the log-variance [B, C, ...] of a step, between the two extremes of that step."""
        v = widened(predicted)
        smallest = expand_like(posterior_variance(level, before).log(), v)
        largest = expand_like(beta(level, before).log(), v)
        return interpolated(v, smallest, largest)

    @staticmethod
    def _log_posterior_variance(t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return log beta~_t [B]; at t = 0, where beta~ is 0, that of t = 1."""
        t = t.clamp(min=1)
        return posterior_variance(schedule.level(t), schedule.level_before(t)).log()


def interpolated(v: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Return ``f largest + (1 - f) smallest`` with ``f = (v + 1) / 2``, all [B, C, ...]."""
    f = (v + 1) / 2
    return f * largest + (1 - f) * smallest


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_channels(output: Tensor, x_t: Tensor, times: int, other: str) -> None:
    """Compare the number of output channels with that of the input.

    Args:
        output: What the denoiser returned [B, C', ...].
        x_t: Its input [B, C, ...].
        times: The expected C' / C, 1 or 2.
        other: What a recipe writes for the other number.

    Raises:
        InputError: If they do not fit.
    """
    channels = x_t.shape[1]
    if output.shape[1] == times * channels:
        return
    remedy = f"Build the model with out_channels: {times * channels}"
    if output.shape[1] == (3 - times) * channels:
        remedy = f"Write {other}"
    raise InputError(
        f"the model returns {output.shape[1]} channels for an input of {channels}, but "
        f"{times * channels} are expected. {remedy}."
    )


def normal_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """Return the KL divergence of two diagonal Gaussians for each element, in nats.

    Args:
        mean: Mean of the first one.
        log_variance: Log-variance of the first one.
        other_mean: Mean of the second one.
        other_log_variance: Log-variance of the second one.
    """
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (ratio.exp() - 1 - ratio + distance)


def pixel_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-likelihood of 8-bit pixels under Gaussians, for each element.

    It is the mass in a bin of half width 1/255 around x0; the outermost bins reach to infinity.

    Args:
        x0: Pixels in [-1, 1].
        mean: Means of the Gaussians.
        log_std: Logarithms of their standard deviations.
    """
    scale = torch.exp(-log_std)
    below = normal_cdf(scale * (x0 - mean - 1 / 255))
    above = normal_cdf(scale * (x0 - mean + 1 / 255))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """Return the normal distribution function, in the tanh approximation of the published bounds.

    Its error is up to 3e-4.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
