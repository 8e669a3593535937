"""Nearest-neighbour balls of two feature sets: precision and recall, density and coverage.

A row's ball reaches to its k-th nearest other row in its own set. Squared distances are |a|^2 + |b|^2 - 2 a.b in float64, about the mean
of the balls' centres, of a block of rows against a block of rows, so memory does not grow with the number of images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from difftrain.distributed import share, sum_over_processes
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.rows import Rows, as_rows
from difftrain.evaluation.views import piece
from difftrain.registry import InputError

BLOCK = 1024  # rows on either side: 8 MiB of distances
ROUNDING = 1e-12  # of the largest |x|^2: far above float64's rounding, far below what float32 features can tell apart


def precision_recall(
    reference: Tensor | Rows, generated: Tensor | Rows, neighbours: int = 3, block: int = BLOCK, dealt: bool = False
) -> tuple[float, float]:
    """(precision, recall): the share of generated rows inside the reference's manifold, and the other way round.

    A set's manifold is the union of the balls about its rows. Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for
    Assessing Generative Models", arXiv:1904.06991. reference [N, D], generated [M, D]; both depend on N and M, so compare scores of
    equal counts. dealt: collective, the work is dealt out over processes. Raises InputError unless both have more than `neighbours` rows.
    """
    reference, generated = checked(reference, generated, neighbours, at_least=(neighbours + 1,) * 2)
    of_reference, of_generated = (Balls(rows, neighbours, block, dealt) for rows in (reference, generated))
    return share_of(of_reference.holding(generated)[0]), share_of(of_generated.holding(reference)[0])


def density_coverage(
    reference: Tensor | Rows, generated: Tensor | Rows, neighbours: int = 5, block: int = BLOCK, dealt: bool = False
) -> tuple[float, float]:
    """(density, coverage): how many of the reference's balls hold a generated row, over k; the share of balls that hold any of them.

    density = 1/(k M) sum_j sum_i [y_j in B(x_i)], coverage = 1/N sum_i [some y_j in B(x_i)]; about 1 and 1 - 2^-k for two large sets of one
    distribution. Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models", arXiv:2002.09797. Balls are closed,
    so copies of one image lie in each other's. Raises InputError unless there are more than
    `neighbours` reference rows and a generated one.
    """
    reference, generated = checked(reference, generated, neighbours, at_least=(neighbours + 1, 1))
    held_by, holds = Balls(reference, neighbours, block, dealt).holding(generated)
    return float(held_by.double().mean() / neighbours), share_of(holds)


def checked(reference: Tensor | Rows, generated: Tensor | Rows, neighbours: int, at_least: tuple[int, int]) -> tuple[Rows, Rows]:
    if neighbours < 1:
        raise InputError(f"neighbours = {neighbours}: expected at least 1.")
    reference, generated = as_rows(reference), as_rows(generated)
    check_rows(reference, "reference", at_least=at_least[0])
    check_rows(generated, "generated", reference.width, at_least[1])
    return reference, generated


def share_of(counts: Tensor) -> float:
    return float((counts > 0).double().mean())


class Balls:
    """The balls about the rows of `centres`. Collective where the work is dealt out."""

    def __init__(self, centres: Rows, neighbours: int, block: int = BLOCK, dealt: bool = False):
        self.centres, self.block, self.dealt = centres, block, dealt
        self.origin = sum((rows.double().sum(dim=0) for rows in centres.blocks()), torch.zeros(())) / len(centres)
        largest = max(float((rows.double() - self.origin).square().sum(dim=1).max()) for rows in centres.blocks())
        self.reach = self.radii(neighbours) + ROUNDING * largest  # [N], squared

    def radii(self, neighbours: int) -> Tensor:
        """The squared distance [N] of each centre to its k-th nearest other one."""
        radii = torch.zeros(len(self.centres), dtype=torch.float64)
        for start in self.starts(self.centres):
            rows = self.about_origin(self.centres, start)
            nearest = torch.full((len(rows), 0), torch.inf, dtype=torch.float64)
            for other in range(0, len(self.centres), self.block):
                distances = squared(rows, self.about_origin(self.centres, other))
                if other == start:
                    distances.fill_diagonal_(torch.inf)  # a row is no neighbour of its own
                candidates = torch.cat([nearest, distances], dim=1)
                nearest = candidates.topk(min(neighbours, candidates.shape[1]), dim=1, largest=False).values
            radii[start : start + len(rows)] = nearest.amax(dim=1)
        return self.joined(radii)

    def holding(self, points: Rows) -> tuple[Tensor, Tensor]:
        """How many balls hold each point [M], and how many points each ball holds [N]; long."""
        held_by, holds = torch.zeros(len(points), dtype=torch.long), torch.zeros(len(self.centres), dtype=torch.long)
        for start in self.starts(points):
            rows = self.about_origin(points, start)
            for centre in range(0, len(self.centres), self.block):
                inside = squared(rows, self.about_origin(self.centres, centre)) <= self.reach[centre : centre + self.block]
                held_by[start : start + len(rows)] += inside.sum(dim=1)
                holds[centre : centre + self.block] += inside.sum(dim=0)
        return self.joined(held_by), self.joined(holds)

    def starts(self, rows: Rows) -> Iterator[int]:
        starts = range(0, len(rows), self.block)
        return share(starts) if self.dealt else iter(starts)

    def about_origin(self, rows: Rows, start: int) -> Tensor:
        return piece(rows, start, self.block) - self.origin

    def joined(self, values: Tensor) -> Tensor:
        return sum_over_processes(values) if self.dealt else values


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [n, m] of a [n, D] to b [m, D]."""
    return (a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)
