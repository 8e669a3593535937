"""What the denoiser outputs, and how output, x0 and eps imply each other.

All of it follows from x_t = alpha x0 + sigma eps. Nothing assumes alpha^2 + sigma^2 = 1.
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from difftrain.objective.schedule import NoiseLevel, expand_like

Parameterization = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What the denoiser outputs: eps, x0, v = alpha eps - sigma x0, u = eps - x0 (diffusers' names)."""


class Estimate(NamedTuple):
    """What an output implies at x_t.

    Args:
        x0: The clean sample [B, ...].
        eps: The noise [B, ...].
    """

    x0: Tensor
    eps: Tensor


def estimate(kind: Parameterization, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Estimate:
    """Return x0 and eps that an output implies.

    Args:
        kind: What the output is. "epsilon" divides by alpha and "sample" by sigma: their estimates
            are not finite where that is 0.
        output: [B, ...].
        x_t: The denoiser's input, of the same shape.
        level: Its noise levels [B].
    """
    check_same_shape(output, x_t)
    alpha, sigma = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    if kind == "epsilon":
        return Estimate((x_t - sigma * output) / alpha, output)
    if kind == "sample":
        return Estimate(output, (x_t - alpha * output) / sigma)
    if kind == "v_prediction":
        square = alpha**2 + sigma**2
        x0 = (alpha * x_t - sigma * output) / square
        return Estimate(x0, (sigma * x_t + alpha * output) / square)
    if kind == "flow_prediction":
        total = alpha + sigma
        return Estimate((x_t - sigma * output) / total, (x_t + alpha * output) / total)
    raise unknown_parameterization(kind)


def target(kind: Parameterization, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """Return what the output is compared with.

    Args:
        kind: What the output is.
        x0: Clean samples [B, ...].
        eps: Noise of the same shape.
        level: Noise levels [B].

    Returns:
        [B, ...].
    """
    check_same_shape(x0, eps)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return expand_like(level.alpha, x0) * eps - expand_like(level.sigma, x0) * x0
    if kind == "flow_prediction":
        return eps - x0
    raise unknown_parameterization(kind)


def squared_error_scale(kind: Parameterization, level: NoiseLevel) -> Tensor:
    """Return the scale [B] float64 in |error of the output|^2 = scale |error of x0|^2.

    Args:
        kind: What the output is.
        level: Noise levels [B] of the x_t at which both errors are taken.
    """
    alpha, sigma = level.alpha, level.sigma
    if kind == "epsilon":
        return (alpha / sigma) ** 2
    if kind == "sample":
        return alpha.new_ones(alpha.shape)
    if kind == "v_prediction":
        return ((alpha**2 + sigma**2) / sigma) ** 2
    if kind == "flow_prediction":
        return ((alpha + sigma) / sigma) ** 2
    raise unknown_parameterization(kind)


def unknown_parameterization(kind: str) -> ValueError:
    """Return the error for a parameterization that does not exist."""
    known = ", ".join(get_args(Parameterization))
    return ValueError(f"unknown parameterization {kind!r}; known: {known}")


def check_same_shape(a: Tensor, b: Tensor) -> None:
    """Compare shapes that must agree, because broadcasting would hide a mistake.

    Raises:
        ValueError: If they differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"expected equal shapes, got {list(a.shape)} and {list(b.shape)}")
