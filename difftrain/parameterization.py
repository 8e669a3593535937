"""What the network outputs, and how outputs, x0 and eps imply each other, for any alpha and sigma.

The one relation behind everything: x_t = alpha x0 + sigma eps. Nothing here assumes alpha^2 + sigma^2 = 1.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from difftrain.schedule import NoiseLevel, expand_like

Parameterization = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


class Estimate(NamedTuple):
    """x0 and eps that an output implies at x_t, each of the shape of x_t."""

    x0: Tensor
    eps: Tensor


def estimate(kind: Parameterization, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Estimate:
    """x0 and eps from the network's output at x_t [B, ...] and level [B].

    epsilon divides by alpha, sample by sigma: not finite where that is 0.
    """
    same_shape(output, x_t)
    alpha, sigma = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    if kind == "epsilon":
        return Estimate((x_t - sigma * output) / alpha, output)
    if kind == "sample":
        return Estimate(output, (x_t - alpha * output) / sigma)
    if kind == "v_prediction":  # v = alpha eps - sigma x0
        square = alpha**2 + sigma**2
        return Estimate((alpha * x_t - sigma * output) / square, (sigma * x_t + alpha * output) / square)
    if kind == "flow_prediction":  # u = eps - x0
        total = alpha + sigma
        return Estimate((x_t - sigma * output) / total, (x_t + alpha * output) / total)
    raise ValueError(f"unknown parameterization {kind!r}; known: epsilon, sample, v_prediction, flow_prediction")


def target(kind: Parameterization, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """What the output is compared with, of the shape of x0."""
    same_shape(x0, eps)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return expand_like(level.alpha, x0) * eps - expand_like(level.sigma, x0) * x0
    if kind == "flow_prediction":
        return eps - x0
    raise ValueError(f"unknown parameterization {kind!r}; known: epsilon, sample, v_prediction, flow_prediction")


def squared_error_scale(kind: Parameterization, level: NoiseLevel) -> Tensor:
    """[B] float64: |error of the output|^2 = scale |error of x0|^2, at a given x_t."""
    alpha, sigma = level.alpha, level.sigma
    if kind == "epsilon":
        return (alpha / sigma) ** 2
    if kind == "sample":
        return alpha.new_ones(alpha.shape)
    if kind == "v_prediction":
        return ((alpha**2 + sigma**2) / sigma) ** 2
    if kind == "flow_prediction":
        return ((alpha + sigma) / sigma) ** 2
    raise ValueError(f"unknown parameterization {kind!r}; known: epsilon, sample, v_prediction, flow_prediction")


def same_shape(a: Tensor, b: Tensor) -> None:
    """Broadcasting hides mistakes: shapes that must agree are compared before they meet."""
    if a.shape != b.shape:
        raise ValueError(f"expected equal shapes, got {list(a.shape)} and {list(b.shape)}")
