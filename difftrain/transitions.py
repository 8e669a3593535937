"""One step of the reverse process from an estimate: ancestral, DDIM, flow Euler. Equal to diffusers' own samplers.

Used inside objectives and diagnostics, where a step must be differentiable and its noise keyed; generation goes through
diffusers' schedulers.
"""

from typing import NamedTuple

from torch import Tensor

from difftrain.parameterization import Estimate
from difftrain.schedule import NoiseLevel, expand_like


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) for s < t: a Gaussian with this mean [B, ...], variance [B] and log-variance [B], float64."""

    mean: Tensor
    variance: Tensor


def beta(level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """Variance [B] of q(x_t | x_s): sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2."""
    return level.sigma**2 - (level.alpha / before.alpha) ** 2 * before.sigma**2


def posterior(x0: Tensor, x_t: Tensor, level: NoiseLevel, before: NoiseLevel) -> Posterior:
    """q(x_s | x_t, x0). Ho et al. 2020, equations 6 and 7, for any alpha and sigma."""
    step = beta(level, before)
    from_x0 = before.alpha * step / level.sigma**2
    from_x_t = (level.alpha / before.alpha) * before.sigma**2 / level.sigma**2
    mean = expand_like(from_x0, x0) * x0 + expand_like(from_x_t, x_t) * x_t
    return Posterior(mean, step * before.sigma**2 / level.sigma**2)


def ancestral(x_t: Tensor, estimate: Estimate, level: NoiseLevel, before: NoiseLevel, noise: Tensor) -> Tensor:
    """x_s drawn from the posterior with the estimated x0, variance of the posterior (diffusers' fixed_small)."""
    mean, variance = posterior(estimate.x0, x_t, level, before)
    return mean + expand_like(variance.sqrt(), x_t) * noise


def ddim(x_t: Tensor, estimate: Estimate, level: NoiseLevel, before: NoiseLevel, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + eta sqrt(v) noise. Song et al. 2021, arXiv:2010.02502, equation 12."""
    variance = beta(level, before) * before.sigma**2 / level.sigma**2
    kept = (before.sigma**2 - eta**2 * variance).clamp(min=0).sqrt()
    x_s = expand_like(before.alpha, x_t) * estimate.x0 + expand_like(kept, x_t) * estimate.eps
    if eta > 0:
        if noise is None:
            raise ValueError(f"DDIM with eta = {eta} adds noise, but none was given")
        x_s = x_s + expand_like(eta * variance.sqrt(), x_t) * noise
    return x_s


def flow_euler(x_t: Tensor, estimate: Estimate, level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """x_s = x_t + (sigma_s - sigma_t) (eps - x0), on a flow schedule."""
    return x_t + expand_like(before.sigma - level.sigma, x_t) * (estimate.eps - estimate.x0)
