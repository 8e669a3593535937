"""Nearest-neighbour balls of two feature sets: precision and recall, density and coverage.

A row's ball reaches to its k-th nearest other row in its own set. Squared distances are |a|^2 +
|b|^2 - 2 a.b in float64, about the mean of the balls' centres, of a block of rows against a block
of rows, so memory does not grow with the number of samples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.processes import share
from difftrain.evaluation.agreement import summed
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.rows import Rows, as_rows

BLOCK = 1024  # rows on either side: 8 MiB of distances
# Of the largest |x|^2: far above float64's rounding, far below what float32 features can tell
# apart.
ROUNDING = 1e-12


def precision_recall(
    reference: Tensor | Rows,
    generated: Tensor | Rows,
    neighbours: int = 3,
    block: int = BLOCK,
    dealt: bool = False,
) -> tuple[float, float]:
    """Compute the share of generated rows inside the reference's manifold, and the other way round.

    A set's manifold is the union of the balls about its rows. Both shares depend on the counts N
    and M, so compare scores of equal counts.

    Args:
        reference: Features [N, D] with N > neighbours.
        generated: Features [M, D] with M > neighbours.
        neighbours: The k of the balls, at least 1.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes. Collective if so.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        InputError: If there are too few rows, of different widths, or some that are not finite.

    Reference:
        Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
        Models", arXiv:1904.06991.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    check_neighbours(reference, generated, neighbours, fewest_generated=neighbours + 1)
    of_reference = Balls(reference, neighbours, block, dealt)
    of_generated = Balls(generated, neighbours, block, dealt)
    held_by_reference, _ = of_reference.holding(generated)
    held_by_generated, _ = of_generated.holding(reference)
    return share_held(held_by_reference), share_held(held_by_generated)


def density_coverage(
    reference: Tensor | Rows,
    generated: Tensor | Rows,
    neighbours: int = 5,
    block: int = BLOCK,
    dealt: bool = False,
) -> tuple[float, float]:
    """Compute density and coverage.

    Density is the mean number of reference balls that hold a generated row, over k:
    1/(k M) sum_j sum_i [y_j in B(x_i)]. Coverage is the share of balls that hold any:
    1/N sum_i [some y_j in B(x_i)]. For two large sets of one distribution they are about 1 and
    1 - 2^-k. Balls are closed, so copies of one sample lie in each other's.

    Args:
        reference: Features [N, D] with N > neighbours.
        generated: Features [M, D] with M >= 1.
        neighbours: The k of the balls, at least 1.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes. Collective if so.

    Returns:
        (density, coverage). Density can exceed 1.

    Raises:
        InputError: If there are too few rows, of different widths, or some that are not finite.

    Reference:
        Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
        arXiv:2002.09797.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    check_neighbours(reference, generated, neighbours, fewest_generated=1)
    held_by, holds = Balls(reference, neighbours, block, dealt).holding(generated)
    return float(held_by.double().mean() / neighbours), share_held(holds)


def check_neighbours(
    reference: Rows, generated: Rows, neighbours: int, fewest_generated: int
) -> None:
    """Check the rows that balls are put around.

    Args:
        reference: The reference's rows.
        generated: The generated rows.
        neighbours: The k of the balls.
        fewest_generated: The fewest generated rows.

    Raises:
        InputError: If k is below 1, or if rows are too few, of different widths, or not finite.
    """
    if neighbours < 1:
        raise InputError(f"neighbours = {neighbours}: expected at least 1.")
    check_rows(reference, "reference", at_least=neighbours + 1)
    check_rows(generated, "generated", reference.width, fewest_generated)


def share_held(counts: Tensor) -> float:
    """Return the share of counts [n] above 0."""
    return float((counts > 0).double().mean())


class Balls:
    """The balls about the rows of a set. Collective, as its methods are, if `dealt`.

    Args:
        centres: The rows [N, D].
        neighbours: The k of the balls.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes.
    """

    def __init__(self, centres: Rows, neighbours: int, block: int = BLOCK, dealt: bool = False):
        self.centres, self.block, self.dealt = centres, block, dealt
        self.origin = torch.zeros(())
        for rows in centres.blocks():
            self.origin = self.origin + rows.double().sum(dim=0)
        self.origin = self.origin / len(centres)
        largest = 0.0
        for rows in centres.blocks():
            squares = (rows.double() - self.origin).square().sum(dim=1)
            largest = max(largest, float(squares.max()))
        self.reach = self.radii(neighbours) + ROUNDING * largest  # [N], squared

    def radii(self, neighbours: int) -> Tensor:
        """Return the squared distance [N] of each centre to its k-th nearest other one."""

        def own() -> Tensor:
            radii = torch.zeros(len(self.centres), dtype=torch.float64)
            for start in self._starts(self.centres):
                nearest = self._nearest(start, neighbours)
                radii[start : start + len(nearest)] = nearest.amax(dim=1)
            return radii

        return summed(own, self.dealt)

    def holding(self, points: Rows) -> tuple[Tensor, Tensor]:
        """Count which points [M, D] lie in which balls.

        Returns:
            How many balls hold each point [M], and how many points each ball holds [N]; long.
        """
        num = len(points)

        def own() -> Tensor:
            counts = torch.zeros(num + len(self.centres), dtype=torch.long)
            held_by, holds = counts[:num], counts[num:]
            for start in self._starts(points):
                rows = self._about_origin(points, start)
                for centre in range(0, len(self.centres), self.block):
                    distances = squared_between(rows, self._about_origin(self.centres, centre))
                    inside = distances <= self.reach[centre : centre + self.block]
                    held_by[start : start + len(rows)] += inside.sum(dim=1)
                    holds[centre : centre + self.block] += inside.sum(dim=0)
            return counts

        counts = summed(own, self.dealt)
        return counts[:num], counts[num:]

    def _nearest(self, start: int, neighbours: int) -> Tensor:
        """Return squared distances [b, k] of a block's centres to their nearest other centres."""
        rows = self._about_origin(self.centres, start)
        nearest = torch.full((len(rows), 0), torch.inf, dtype=torch.float64)
        for other in range(0, len(self.centres), self.block):
            distances = squared_between(rows, self._about_origin(self.centres, other))
            if other == start:
                distances.fill_diagonal_(torch.inf)  # a row is not a neighbour of itself
            candidates = torch.cat([nearest, distances], dim=1)
            wanted = min(neighbours, candidates.shape[1])
            nearest = candidates.topk(wanted, dim=1, largest=False).values
        return nearest

    def _starts(self, rows: Rows) -> Iterator[int]:
        starts = range(0, len(rows), self.block)
        return share(starts) if self.dealt else iter(starts)

    def _about_origin(self, rows: Rows, start: int) -> Tensor:
        return rows.part(start, self.block) - self.origin


def squared_between(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances [n, m] of rows a [n, D] to rows b [m, D]."""
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return (squares - 2 * a @ b.T).clamp(min=0)
