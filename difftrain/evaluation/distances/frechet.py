"""The Frechet distance of two sets of features, each described by its mean and covariance."""

import math

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.distances.moments import GaussianSummary, moments_of
from difftrain.evaluation.rows import Rows

TOLERANCE = 1e-7  # relative: error of a distance above which the slower, exact way is taken


def frechet_distance(
    a: GaussianSummary | Tensor | Rows, b: GaussianSummary | Tensor | Rows
) -> float:
    """Compute |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2) in float64.

    It is the squared 2-Wasserstein distance of two Gaussians, and 0, up to rounding, for equal
    statistics.

    Args:
        a: Statistics, such as `FeatureStatistics`, or features [N, D].
        b: Statistics, or features [M, D].

    Returns:
        The distance.

    Raises:
        InputError: If the widths differ, or if one side has fewer than 2 samples.

    Reference:
        Frechet 1957; Dowson and Landau 1982, "The Frechet distance between multivariate normal
        distributions"; of image features Heusel et al. 2017, arXiv:1706.08500.
    """
    a, b = summary_of(a), summary_of(b)
    if a.num_features != b.num_features:
        raise InputError(
            f"features of width {a.num_features} and {b.num_features} cannot be compared. Use one "
            "extractor for both."
        )
    apart = (a.mean - b.mean).square().sum()
    # The covariance of fewer samples has the smaller rank, which makes it the faster one to
    # factorise.
    fewer, more = sorted((a, b), key=lambda s: s.count if s.count_is_known else math.inf)
    return float(apart + a.cov.trace() + b.cov.trace() - 2 * trace_of_root(fewer.cov, more.cov))


def summary_of(features: GaussianSummary | Tensor | Rows) -> GaussianSummary:
    """Return statistics as they are, and those of features [N, D]."""
    return moments_of(features) if isinstance(features, (Tensor, Rows)) else features


def trace_of_root(s1: Tensor, s2: Tensor) -> Tensor:
    """Compute Tr sqrt(S1 S2), which is real and not negative.

    It is the sum of the roots of the eigenvalues of L^T S2 L with S1 = L L^T. An eigenvalue comes
    with an error of eps times the largest one, which its root enlarges where it is small. Where
    that is not negligible beside the distance (ill-conditioned or nearly equal covariances) the
    roots are found without squares: they are the singular values of L^T K with S2 = K K^T.

    Args:
        s1: A covariance [D, D]. The computation is fastest if it has the smaller rank.
        s2: The other covariance [D, D].
    """
    left = factor(s1)
    product = left.T @ s2 @ left
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2)
    values = eigenvalues.clamp(min=0)
    total = values.sqrt().sum()
    if 2 * uncertainty(values) <= TOLERANCE * (s1.trace() + s2.trace() - 2 * total):
        return total
    singular: Tensor = torch.linalg.svdvals(left.T @ factor(s2))
    return singular.sum()


def uncertainty(values: Tensor) -> Tensor:
    """Estimate the error of the sum of the roots of eigenvalues [r].

    Each eigenvalue is known to some eps of the largest one.
    """
    if not len(values):
        return values.sum()
    error = 8 * torch.finfo(values.dtype).eps * values.max()
    return torch.minimum(error / (2 * values.sqrt()), error.sqrt()).nan_to_num(nan=0.0).sum()


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
