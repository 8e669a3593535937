"""Factors L of a covariance S = L L^T, of as many columns as its rank."""

import torch
from torch import Tensor


def factor(cov: Tensor) -> Tensor:
    """Factorise a covariance [D, D] as L L^T.

    Returns:
        L [D, rank]: Cholesky's factor of a matrix of full rank, scaled eigenvectors of any other.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    # A pivot this small may be rounding: Cholesky's factor of a singular matrix is noise of size
    # sqrt(eps).
    if not failed and pivots.min() > 1e-9 * pivots.max():
        return lower
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(cov) * torch.finfo(cov.dtype).eps * values.max().clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def factor_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise the covariance (ddof 1) of rows [n, D] with n >= 2, without forming it.

    The n centred rows c_i add up to 0, so n - 1 rows have the same products: a Householder
    reflection that takes the direction (1, ..., 1) to the first row leaves
    c_i + c_1 / (sqrt(n) - 1) in the others and 0 in the first.

    Args:
        rows: The rows, float64.

    Returns:
        The mean [D], and L [D, n - 1].
    """
    mean = rows.mean(dim=0)
    centred = rows - mean
    num = len(rows)
    others = centred[1:].add_(centred[0] / (num**0.5 - 1)).div_((num - 1) ** 0.5)
    return mean, others.T
