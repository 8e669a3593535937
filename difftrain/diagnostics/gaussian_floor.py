"""What a perfect model scores as exposure bias on Gaussian data, in closed form."""

import math

import torch
from torch import Tensor

from difftrain.diagnostics.base import Subject
from difftrain.objective.schedule import NoiseLevel
from difftrain.objective.transitions import beta


def gaussian_std(
    subject: Subject, variance: Tensor, timesteps: list[int], step: str, consecutive: bool
) -> Tensor:
    """Compute the spread of x_s - alpha_s x0 of a perfect model of Gaussian x0, pixel by pixel.

    Its x0_hat is linear in x_t, so Var(x) = V and Cov(x, x0) = C follow a recursion: with x_s = g
    x_t + constant + noise of variance v, C_s = g C, V_s = g^2 V + v, and Var(x_s - alpha_s x0) =
    V_s - 2 alpha_s C_s + alpha_s^2 variance. A learned variance is perfect too: it is that of x_s
    given x_t, but for the step to the clean sample, which adds no noise.

    Args:
        subject: Whose schedule it is, and whether its variance is learned.
        variance: By pixel, [D].
        timesteps: Table indices, ascending.
        step: "ancestral" or "ddim".
        consecutive: Whether x_s lies on one reverse process; otherwise each step starts at a true
            x_t.

    Returns:
        p_s [timesteps], s one step below each timestep.
    """
    is_learned = step == "ancestral" and subject.variance.output_channels == 2
    V = C = variance
    found = []
    last = len(timesteps) - 1
    for k in range(last, -1, -1):
        t = table_level(subject, timesteps[k])
        s = table_level(subject, timesteps[k - 1] if k else -1)
        true_V = t.alpha**2 * variance + t.sigma**2
        if k == last or not consecutive:
            V, C = true_V, t.alpha * variance
        by_x0, by_x, v = step_coefficients(t, s, step)
        if is_learned and k > 0:
            v = v + by_x0**2 * variance * t.sigma**2 / true_V
        g = by_x0 * t.alpha * variance / true_V + by_x
        V, C = g**2 * V + v, g * C
        spread = V - 2 * s.alpha * C + s.alpha**2 * variance
        found.append(spread.clamp(min=0).sqrt().mean())
    return torch.stack(found[::-1])


def mean_of_std(num: int) -> float:
    """Return what the population std (ddof 0) of `num` samples of N(0, 1) is on average.

    It is ``sqrt(2 / N) Gamma(N / 2) / Gamma((N - 1) / 2)``: 0 of one sample, 1 in the limit.
    """
    if num == 1:
        return 0.0
    return math.sqrt(2 / num) * math.exp(math.lgamma(num / 2) - math.lgamma((num - 1) / 2))


def table_level(subject: Subject, t: int) -> NoiseLevel:
    """Return the noise level [1] at a table index; t = -1 is the clean sample."""
    return subject.schedule.level_before(torch.tensor([t]), steps=0)


def step_coefficients(t: NoiseLevel, s: NoiseLevel, step: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, B, v), each [1], of x_s = A x0_hat + B x_t + noise of variance v.

    Args:
        t: The level before the step.
        s: The level after it.
        step: "ancestral" or "ddim".
    """
    if step == "ddim":
        ratio = s.sigma / t.sigma
        return s.alpha - s.sigma * t.alpha / t.sigma, ratio, torch.zeros(1, dtype=torch.float64)
    added = beta(t, s)
    return (
        s.alpha * added / t.sigma**2,
        t.alpha / s.alpha * s.sigma**2 / t.sigma**2,
        added * s.sigma**2 / t.sigma**2,
    )
