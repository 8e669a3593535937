"""Tables of beta_t, the variance that step t of a diffusion adds, in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def spaced(start: float, end: float, num: int) -> Tensor:
    """Return evenly spaced numbers [num], float64."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def betas_of(
    alpha_squared: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float = 0.999
) -> Tensor:
    """Return the betas [T] of a continuous alpha^2: 1 - f((t + 1) / T) / f(t / T).

    Args:
        alpha_squared: f, a function of t/T.
        num_timesteps: T.
        max_beta: The largest beta.
    """
    f = alpha_squared(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def linear_betas(num: int, start: float, end: float) -> Tensor:
    """Return betas [num] that are linear in t."""
    return spaced(start, end, num)


def scaled_linear_betas(num: int, start: float, end: float) -> Tensor:
    """Return betas [num] whose roots are linear in t."""
    return spaced(math.sqrt(start), math.sqrt(end), num) ** 2


def cosine_betas(num: int) -> Tensor:
    """Return betas [num] whose alpha^2 is a squared cosine."""
    return betas_of(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num)


def sigmoid_betas(num: int, start: float, end: float) -> Tensor:
    """Return betas [num] that are a sigmoid of t."""
    return torch.sigmoid(spaced(-6, 6, num)) * (end - start) + start


BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda num, start, end: cosine_betas(num),
    "sigmoid": sigmoid_betas,
}
"""Betas [num] by diffusers' names, from num, beta_start and beta_end."""


def with_divided_snr(betas: Tensor, scale: float) -> Tensor:
    """Return the betas [T] whose SNR is that of `betas` divided by `scale`."""
    alpha_squared = torch.cumprod(1 - betas, 0)
    alpha_squared = alpha_squared / (scale + (1 - scale) * alpha_squared)
    return 1 - alpha_squared / torch.cat([alpha_squared.new_ones(1), alpha_squared[:-1]])
