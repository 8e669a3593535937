"""The standard error of an unbiased MMD^2 of paired samples."""

import math

import torch
from torch import Tensor

from difftrain.objective.mmd import BANDWIDTHS, squared_distances


def pair_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Return h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), [n, n] float64.

    The kernel is that of `difftrain.objective.mmd`. The mean of h over i != j is the U-statistic of
    MMD^2.

    Args:
        x: Samples [n, D].
        y: Samples [n, D].
        bandwidth: Of the kernel.
    """
    n = len(x)
    distances = squared_distances(torch.cat([x, y]))
    kernel = torch.zeros_like(distances)
    for width in BANDWIDTHS:
        kernel += torch.exp(-distances / (bandwidth * width))
    across = kernel[:n, n:]
    return kernel[:n, :n] + kernel[n:, n:] - across - across.T


def error_of_u(kernel: Tensor) -> float:
    """Return the standard error of the mean of h_ij over i != j.

    ``Var U = (4 (n - 2) zeta_1 + 2 zeta_2) / (n (n - 1))`` with zeta_1 = Var(E[h | z_i]) and zeta_2
    = Var(h). zeta_1 vanishes where both distributions are equal, so both terms count. It is
    estimated from the variance of the row means, whose expectation is (n - 2) / (n - 1)^2 times
    ((n - 4) zeta_1 + zeta_2), and is not below 0. So where both distributions are equal the error
    is too large, by about a third.

    Args:
        kernel: h [n, n], symmetric.

    Returns:
        The standard error; NaN for fewer than 5 samples.

    Reference:
        Hoeffding 1948, "A Class of Statistics with Asymptotically Normal Distribution".
    """
    n = len(kernel)
    if n < 5:
        return math.nan
    off_diagonal = kernel[~torch.eye(n, dtype=torch.bool, device=kernel.device)].reshape(n, n - 1)
    zeta_2 = off_diagonal.var()
    of_rows = off_diagonal.mean(1).var()
    zeta_1 = (((n - 1) ** 2 / (n - 2) * of_rows - zeta_2) / (n - 4)).clamp(min=0)
    return float(((4 * (n - 2) * zeta_1 + 2 * zeta_2) / (n * (n - 1))).sqrt())
