"""Kernel distance: the squared maximum mean discrepancy of two feature sets under a polynomial kernel (KID)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_pair
from difftrain.registry import InputError


def kernel_distance(reference: Tensor, generated: Tensor, degree: int = 3, block: int = 1024) -> float:
    """MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),  k(x, y) = (x.y / D + 1)^degree.

    Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401. reference [N, D], generated [M, D]; unbiased, so it
    can be negative when the sets agree. All pairs are used (the published KID averages this over subsets of 1,000, which
    has the same expectation), in blocks of rows, so memory does not grow with N M. Raises InputError for N or M < 2.
    """
    if degree < 1:
        raise InputError(f"degree = {degree}: the polynomial kernel needs a degree of at least 1.")
    check_pair(reference, generated, at_least=2)
    n, m = len(reference), len(generated)
    within_reference = (kernel_sum(reference, reference, degree, block) - diagonal_sum(reference, degree)) / (n * (n - 1))
    within_generated = (kernel_sum(generated, generated, degree, block) - diagonal_sum(generated, degree)) / (m * (m - 1))
    return float(within_reference + within_generated - 2 * kernel_sum(reference, generated, degree, block) / (n * m))


def kernel_sum(x: Tensor, y: Tensor, degree: int, block: int) -> Tensor:
    """Sum over all pairs of k(x_i, y_j), float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in blocks(x, block):
        for columns in blocks(y, block):
            total += (rows @ columns.T / x.shape[1] + 1).pow(degree).sum()
    return total


def diagonal_sum(x: Tensor, degree: int) -> Tensor:
    """Sum over i of k(x_i, x_i), float64."""
    return (x.double().square().sum(dim=1) / x.shape[1] + 1).pow(degree).sum()


def blocks(x: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive rows of x, `size` at a time, in float64."""
    return (rows.double() for rows in x.split(size))
