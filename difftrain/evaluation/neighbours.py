"""Distances to nearest neighbours: precision and recall of a generated set, and how near it lies to given images.

Squared distances are |a|^2 + |b|^2 - 2 a.b in float64, about the mean of the second set, in blocks of rows of bounded size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_pair
from difftrain.registry import InputError

BLOCK_ENTRIES = 2**22  # distances held at once: 32 MiB
ROUNDING = 1e-12  # of the largest |x|^2: far above float64's rounding, far below what float32 features can tell apart


def precision_recall(reference: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated rows inside the reference's manifold, and the other way round.

    A set's manifold is the union of balls about its rows, each reaching to the row's k-th nearest neighbour in the set.
    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", arXiv:1904.06991.
    reference [N, D], generated [M, D]; both depend on N and M, so compare scores of equal counts. Raises InputError
    unless both sets have more than `neighbours` rows.
    """
    if neighbours < 1:
        raise InputError(f"neighbours = {neighbours}: expected at least 1.")
    check_pair(reference, generated, at_least=neighbours + 1)
    return share_inside(generated, reference, neighbours), share_inside(reference, generated, neighbours)


def nearest_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance [N] (float64) of each row of a [N, D] to its nearest row of b [M, D]; exactly 0 for a copy."""
    check_pair(b, a, at_least=1)
    nearest = torch.cat([squared.argmin(dim=1) for squared in squared_distances(a, b)])
    return (a.double() - b.double()[nearest]).norm(dim=1)


def share_inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of `points` that lie in a ball about one of `centres`."""
    # k-th nearest other row: the row itself comes first.
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in squared_distances(centres, centres)])
    reach = radii + ROUNDING * (centres.double() - centres.double().mean(dim=0)).square().sum(dim=1).max()
    inside = torch.cat([(rows <= reach).any(dim=1) for rows in squared_distances(points, centres)])
    return float(inside.double().mean())


def squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Blocks [rows, M] of the squared distances of a [N, D] to b [M, D], in the order of a's rows."""
    centre = b.double().mean(dim=0)
    b = b.double() - centre
    for rows in a.split(max(1, BLOCK_ENTRIES // len(b))):
        rows = rows.double() - centre
        yield (rows.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * rows @ b.T).clamp(min=0)
