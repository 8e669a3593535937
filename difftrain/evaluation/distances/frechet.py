"""The Frechet distance of two sets of features, each described by its mean and covariance."""

import math

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.distances.few_samples import summary_of_rows
from difftrain.evaluation.distances.moments import GaussianSummary
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
    return float(apart + a.variance + b.variance - 2 * trace_of_root(fewer, more))


def summary_of(features: GaussianSummary | Tensor | Rows) -> GaussianSummary:
    """Return statistics as they are, and those of features [N, D]."""
    return summary_of_rows(features) if isinstance(features, (Tensor, Rows)) else features


def trace_of_root(a: GaussianSummary, b: GaussianSummary) -> Tensor:
    """Compute Tr sqrt(S1 S2), which is real and not negative.

    It is the sum of the roots of the eigenvalues of L^T S2 L with S1 = L L^T. An eigenvalue comes
    with an error of eps times the largest one, which its root enlarges where it is small. Where
    that is not negligible beside the distance (ill-conditioned or nearly equal covariances) the
    roots are found without squares: they are the singular values of L^T K with S2 = K K^T.

    Where there are fewer samples than features L and K are the centred samples, so nothing is
    larger than the number of samples.

    Args:
        a: Statistics with the covariance S1. It is fastest if this has the smaller rank.
        b: Statistics with the covariance S2.
    """
    left = a.factor()
    product = b.projected(left)
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2)
    values = eigenvalues.clamp(min=0)
    total = values.sqrt().sum()
    if 2 * uncertainty(values) <= TOLERANCE * (a.variance + b.variance - 2 * total):
        return total
    singular: Tensor = torch.linalg.svdvals(left.T @ b.factor())
    return singular.sum()


def uncertainty(values: Tensor) -> Tensor:
    """Estimate the error of the sum of the roots of eigenvalues [r].

    Each eigenvalue is known to some eps of the largest one.
    """
    if not len(values):
        return values.sum()
    error = 8 * torch.finfo(values.dtype).eps * values.max()
    return torch.minimum(error / (2 * values.sqrt()), error.sqrt()).nan_to_num(nan=0.0).sum()
