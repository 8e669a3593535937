"""Squared maximum mean discrepancy (MMD) of two feature sets: kernel distance (KID) and CMMD.

MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) is summed in float64 over blocks of rows
against blocks of rows, so memory does not grow with the number of samples. The sums of blocks can
be shared out over processes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.evaluation.agreement import dealt_values
from difftrain.evaluation.checks import check_pair
from difftrain.evaluation.rows import Rows, SelectedRows, as_rows

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m], symmetric in its arguments

BLOCK = 1024  # rows on either side


def kernel_distance(
    reference: Tensor | Rows,
    generated: Tensor | Rows,
    degree: int = 3,
    block: int = BLOCK,
    dealt: bool = False,
) -> float:
    """Compute the unbiased MMD^2 with the kernel k(x, y) = (x.y / D + 1)^degree.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j). It is
    negative at times when the sets agree. All pairs are used; `kernel_distances` gives the
    published mean over subsets, which has the same expectation.

    Args:
        reference: Features [N, D] with N >= 2.
        generated: Features [M, D] with M >= 2.
        degree: Degree of the kernel, at least 1.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes. Collective if so.

    Returns:
        The distance.

    Raises:
        InputError: If there are too few rows, of different widths, or some that are not finite.

    Reference:
        Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    check_degree(degree)
    check_pair(reference, generated, at_least=2)
    kernel = partial(polynomial, degree=degree)
    return discrepancy(reference, generated, kernel, True, block, dealt)


def kernel_distances(
    reference: Tensor | Rows,
    generated: Tensor | Rows,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    seed: int = 0,
    dealt: bool = False,
) -> Tensor:
    """Compute the kernel distances of random subsets; their mean is the published KID.

    Args:
        reference: Features [N, D] with N >= subset_size.
        generated: Features [M, D] with M >= subset_size.
        subsets: Number of subsets. Each has no row twice and is keyed by the seed and its
            number.
        subset_size: Rows of each side in a subset, at least 2.
        degree: Degree of the kernel, at least 1.
        seed: Seed of the subsets.
        dealt: Whether the subsets are shared out over the processes. Collective if so.

    Returns:
        The distances [subsets], float64.

    Raises:
        InputError: If a set has fewer rows than a subset.

    Reference:
        Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    check_degree(degree)
    check_subsets(len(reference), len(generated), subset_size)
    check_pair(reference, generated, at_least=2)
    kernel = partial(polynomial, degree=degree)

    def subset(rows: Rows, name: str, rng: Rng) -> SelectedRows:
        order = torch.randperm(len(rows), generator=rng.shared(f"kernel_distance.{name}"))
        return SelectedRows(rows, order[:subset_size].sort().values)

    def distance(number: int) -> float:
        rng = Rng(seed, number)
        x = subset(reference, "reference", rng)
        y = subset(generated, "generated", rng)
        return discrepancy(x, y, kernel, unbiased=True)

    return dealt_values(range(subsets), distance, dealt)


def gaussian_discrepancy(
    reference: Tensor | Rows,
    generated: Tensor | Rows,
    sigma: float = 10.0,
    normalised: bool = True,
    block: int = BLOCK,
    dealt: bool = False,
) -> float:
    """Compute the biased MMD^2 with the kernel k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    MMD^2 = mean_{ij} k(x_i, x_j) + mean_{ij} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j). This
    V-statistic counts pairs of a row with itself. It is never negative, 0 for equal sets, and
    biased upwards by about (1 - mean k) (1 / N + 1 / M).

    Args:
        reference: Features [N, D] with N >= 1.
        generated: Features [M, D] with M >= 1.
        sigma: Width of the kernel, above 0.
        normalised: Whether rows are brought to length 1 first.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes. Collective if so.

    Returns:
        The discrepancy. Jayasumana et al. multiply it by 1000.

    Raises:
        InputError: If there are too few rows, of different widths, or some that are not finite.

    Reference:
        Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 5; of images Jayasumana et al. 2024,
        arXiv:2401.09603.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    if not sigma > 0:
        raise InputError(f"sigma = {sigma}: the Gaussian kernel needs a positive width.")
    check_pair(reference, generated, at_least=1)
    kernel = partial(gaussian, sigma=sigma, normalised=normalised)
    return discrepancy(reference, generated, kernel, False, block, dealt)


def polynomial(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """Evaluate (x.y / D + 1)^degree for all pairs of x [n, D] and y [m, D], as [n, m]."""
    return (x @ y.T / x.shape[1] + 1).pow(degree)


def gaussian(x: Tensor, y: Tensor, sigma: float, normalised: bool) -> Tensor:
    """Evaluate exp(-|x - y|^2 / (2 sigma^2)) for all pairs of x [n, D] and y [m, D], as [n, m]."""
    if normalised:
        x = torch.nn.functional.normalize(x, dim=1)
        y = torch.nn.functional.normalize(y, dim=1)
    squared = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * x @ y.T
    return (squared.clamp(min=0) / (-2 * sigma**2)).exp()


class BlockSum(NamedTuple):
    """The kernel's sum over one block of rows of a.

    Args:
        a: The set that the block belongs to.
        b: The other side: all of its rows, or within one set the blocks from the block's own
            onwards.
        start: The block's first row.
        within: Whether a and b are one set.
    """

    a: Rows
    b: Rows
    start: int
    within: bool


def discrepancy(
    reference: Rows,
    generated: Rows,
    kernel: Kernel,
    unbiased: bool,
    block: int = BLOCK,
    dealt: bool = False,
) -> float:
    """Compute the MMD^2 under any kernel.

    Args:
        reference: Features [N, D].
        generated: Features [M, D].
        kernel: The kernel.
        unbiased: Whether pairs of a row with itself are left out.
        block: Rows that are held at once, on either side.
        dealt: Whether the work is shared out over the processes. Collective if so.
    """
    # The sums of k(x, x'), k(y, y') and k(x, y), a block of rows each
    within_reference = [
        BlockSum(reference, reference, i, True) for i in range(0, len(reference), block)
    ]
    within_generated = [
        BlockSum(generated, generated, i, True) for i in range(0, len(generated), block)
    ]
    across = [BlockSum(reference, generated, i, False) for i in range(0, len(reference), block)]
    tasks = within_reference + within_generated + across
    sums = dealt_values(tasks, lambda task: kernel_sum(task, kernel, block, unbiased), dealt)
    # Their means
    n, m = len(reference), len(generated)
    first = len(within_reference)
    second = first + len(within_generated)
    own = int(unbiased)
    mean_reference = sums[:first].sum() / (n * (n - own))
    mean_generated = sums[first:second].sum() / (m * (m - own))
    mean_across = sums[second:].sum() / (n * m)
    return float(mean_reference + mean_generated - 2 * mean_across)


def kernel_sum(task: BlockSum, kernel: Kernel, block: int, without_itself: bool) -> Tensor:
    """Evaluate a block's sum [], float64; in one set later blocks stand for earlier ones too."""
    rows = task.a.part(task.start, block)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(task.start if task.within else 0, len(task.b), block):
        is_own = task.within and start == task.start
        values = kernel(rows, rows if is_own else task.b.part(start, block))
        total = total + values.sum() * (2 if task.within and not is_own else 1)
        if is_own and without_itself:
            total = total - values.diagonal().sum()
    return total


def check_degree(degree: int) -> None:
    """Check the degree of the polynomial kernel.

    Raises:
        InputError: If it is below 1.
    """
    if degree < 1:
        raise InputError(f"degree = {degree}: the polynomial kernel needs a degree of at least 1.")


def check_subsets(num_reference: int, num_generated: int, size: int) -> None:
    """Check that both sets can fill a subset.

    Args:
        num_reference: Rows of the reference.
        num_generated: Rows of the generated set.
        size: Rows of each in a subset.

    Raises:
        InputError: If a set has fewer rows, or if the size is below 2.
    """
    if size < 2:
        raise InputError(
            f"subset_size = {size}: the kernel distance needs at least 2 samples in a subset."
        )
    for count, name in ((num_reference, "reference"), (num_generated, "generated")):
        if count < size:
            raise InputError(
                f"{count} {name} samples are too few for subsets of {size}. Give at least {size} "
                "samples, a smaller subset_size, or subsets: 0 for all pairs."
            )
