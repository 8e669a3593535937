"""One step of the reverse process from an estimate: ancestral, DDIM, Euler on a flow.

The steps equal those of diffusers' samplers. Objectives and diagnostics use them where a step must
have a gradient and its noise a key; generation uses diffusers' schedulers. In every function s < t,
`level` belongs to t and `before` to s.
"""

from typing import NamedTuple

from torch import Tensor

from difftrain.objective.parameterization import Estimate
from difftrain.objective.schedule import NoiseLevel, expand_like


class Posterior(NamedTuple):
    """The Gaussian q(x_s | x_t, x0).

    Args:
        mean: [B, ...].
        variance: [B], float64.
    """

    mean: Tensor
    variance: Tensor


def beta(level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """Return the variance of q(x_t | x_s): ``sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2``, [B]."""
    return level.sigma**2 - (level.alpha / before.alpha) ** 2 * before.sigma**2


def posterior_variance(level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """Return the variance of q(x_s | x_t, x0): ``beta_t sigma_s^2 / sigma_t^2``, [B]."""
    return beta(level, before) * before.sigma**2 / level.sigma**2


def posterior(x0: Tensor, x_t: Tensor, level: NoiseLevel, before: NoiseLevel) -> Posterior:
    """Return q(x_s | x_t, x0), for any alpha and sigma.

    Args:
        x0: Clean samples [B, ...].
        x_t: Noised samples [B, ...].
        level: Noise levels [B] at t.
        before: Noise levels [B] at s.

    Reference:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, equations 6
        and 7.
    """
    from_x0 = before.alpha * beta(level, before) / level.sigma**2
    from_x_t = (level.alpha / before.alpha) * before.sigma**2 / level.sigma**2
    mean = expand_like(from_x0, x0) * x0 + expand_like(from_x_t, x_t) * x_t
    return Posterior(mean, posterior_variance(level, before))


def ancestral(
    x_t: Tensor,
    estimate: Estimate,
    level: NoiseLevel,
    before: NoiseLevel,
    noise: Tensor,
    log_variance: Tensor | None = None,
) -> Tensor:
    """Draw x_s [B, ...] from the posterior with the estimated x0.

    Without `log_variance` the variance is that of the posterior, diffusers' fixed_small.

    Args:
        x_t: Noised samples [B, ...].
        estimate: What the denoiser's output implies at x_t.
        level: Noise levels [B] at t.
        before: Noise levels [B] at s.
        noise: Standard normal numbers [B, ...].
        log_variance: Logarithm of the variance [B, ...], if the model learns it.
    """
    mean, variance = posterior(estimate.x0, x_t, level, before)
    if log_variance is not None:
        return mean + (log_variance / 2).exp().to(x_t) * noise
    return mean + expand_like(variance.sqrt(), x_t) * noise


def ddim(
    x_t: Tensor,
    estimate: Estimate,
    level: NoiseLevel,
    before: NoiseLevel,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Return ``x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + eta sqrt(v) noise``, [B, ...].

    v is the variance of the posterior.

    Args:
        x_t: Noised samples [B, ...].
        estimate: What the denoiser's output implies at x_t.
        level: Noise levels [B] at t.
        before: Noise levels [B] at s.
        eta: 0 is deterministic, 1 is ancestral sampling.
        noise: Standard normal numbers [B, ...], needed if eta > 0.

    Reference:
        Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502, equation 12.
    """
    variance = posterior_variance(level, before)
    kept = (before.sigma**2 - eta**2 * variance).clamp(min=0).sqrt()
    x_s = expand_like(before.alpha, x_t) * estimate.x0 + expand_like(kept, x_t) * estimate.eps
    if eta > 0:
        if noise is None:
            raise ValueError(f"DDIM with eta = {eta} adds noise, but noise is None")
        x_s = x_s + expand_like(eta * variance.sqrt(), x_t) * noise
    return x_s


def flow_euler(x_t: Tensor, estimate: Estimate, level: NoiseLevel, before: NoiseLevel) -> Tensor:
    """Return ``x_s = x_t + (sigma_s - sigma_t) (eps - x0)``, [B, ...], on a flow schedule.

    Args:
        x_t: Noised samples [B, ...].
        estimate: What the denoiser's output implies at x_t.
        level: Noise levels [B] at t.
        before: Noise levels [B] at s.
    """
    return x_t + expand_like(before.sigma - level.sigma, x_t) * (estimate.eps - estimate.x0)
