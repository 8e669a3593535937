"""Shapiro-Wilk test of many columns at once, in float64. Royston 1995, "Remark AS R94", Applied Statistics 44(4), for n of 12 to 5,000.

Written out here because scipy is no dependency of the library.
"""

import math

import torch
from torch import Tensor

LEAST, MOST = 12, 5000


def shapiro_wilk(x: Tensor) -> tuple[Tensor, Tensor]:
    """(W, p) of each column of x [n, D], both [D] float64; NaN for a column without spread.

    W = (sum a_i x_(i))^2 / sum (x_i - mean)^2; ln(1 - W) is standardised to a normal number, whose upper tail is p.
    """
    n = len(x)
    assert LEAST <= n <= MOST, n
    ordered = x.double().sort(0).values
    centred = ordered - ordered.mean(0)
    spread = centred.square().sum(0)
    w = (weights(n)[:, None] * centred).sum(0).square() / torch.where(spread > 0, spread, math.nan)
    log_n = math.log(n)
    mean = polynomial((-1.5861, -0.31082, -0.083751, 0.0038915), log_n)
    std = math.exp(polynomial((-0.4803, -0.082676, 0.0030302), log_n))
    z = ((1 - w).clamp(min=1e-19).log() - mean) / std
    return w, 0.5 * torch.erfc(z / math.sqrt(2))


def weights(n: int) -> Tensor:
    """a [n] float64, antisymmetric, of norm 1: normal scores with the outermost two corrected by polynomials in 1 / sqrt(n)."""
    places = (torch.arange(1, n + 1, dtype=torch.float64) - 0.375) / (n + 0.25)
    scores = math.sqrt(2) * torch.erfinv(2 * places - 1)
    square, u = float(scores.square().sum()), 1 / math.sqrt(n)
    last, second = (float(score) / math.sqrt(square) for score in (scores[-1], scores[-2]))
    last += polynomial((0.0, 0.221157, -0.147981, -2.07119, 4.434685, -2.706056), u)
    second += polynomial((0.0, 0.042981, -0.293762, -1.752461, 5.682633, -3.582633), u)
    inner = (square - 2 * float(scores[-1]) ** 2 - 2 * float(scores[-2]) ** 2) / (1 - 2 * last**2 - 2 * second**2)
    a = scores / math.sqrt(inner)
    a[-1], a[-2], a[0], a[1] = last, second, -last, -second
    return a


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """c_0 + c_1 x + c_2 x^2 + ..."""
    return sum(c * x**k for k, c in enumerate(coefficients))
