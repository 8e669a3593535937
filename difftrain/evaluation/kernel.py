"""Squared maximum mean discrepancy of two feature sets: the kernel distance (KID) and its relative with a Gaussian kernel (CMMD).

MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) is summed in float64 over blocks of rows against blocks of rows, so memory does
not grow with the number of images. The sums of blocks can be dealt out over processes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_pair
from difftrain.evaluation.dealing import dealt_values
from difftrain.evaluation.rows import Rows, as_rows
from difftrain.evaluation.views import Selected, piece
from difftrain.registry import InputError
from difftrain.rng import Rng

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m], symmetric in its arguments

BLOCK = 1024


def kernel_distance(
    reference: Tensor | Rows, generated: Tensor | Rows, degree: int = 3, block: int = BLOCK, dealt: bool = False
) -> float:
    """MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),  k(x, y) = (x.y / D + 1)^degree.

    Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401. reference [N, D], generated [M, D]; unbiased, so it can be
    negative when the sets agree. All pairs are used; `kernel_distances` gives the published mean over subsets, of the same expectation.
    dealt: collective, the work is dealt out over processes. Raises InputError for N or M < 2.
    """
    reference, generated = as_rows(reference), as_rows(generated)
    check_degree(degree)
    check_pair(reference, generated, at_least=2)
    return discrepancy(reference, generated, partial(polynomial, degree=degree), True, block, dealt)


def kernel_distances(
    reference: Tensor | Rows, generated: Tensor | Rows, subsets: int = 100, subset_size: int = 1000, degree: int = 3, seed: int = 0,
    dealt: bool = False,
) -> Tensor:
    """The kernel distances [subsets] (float64) of random subsets, `subset_size` images of each set: their mean is the published KID.

    Each subset is drawn without repetition, keyed by (seed, its number). Raises InputError where a set has fewer images than a subset.
    """  # fmt: skip
    reference, generated = as_rows(reference), as_rows(generated)
    check_degree(degree)
    check_subsets(len(reference), len(generated), subset_size)
    check_pair(reference, generated, at_least=2)

    def distance(number: int) -> float:
        rng = Rng(seed, number)
        chosen = [
            Selected(rows, torch.randperm(len(rows), generator=rng.shared(f"kernel_distance.{name}"))[:subset_size].sort().values)
            for rows, name in ((reference, "reference"), (generated, "generated"))
        ]
        return discrepancy(chosen[0], chosen[1], partial(polynomial, degree=degree), unbiased=True)

    return dealt_values(range(subsets), distance, dealt)


def gaussian_discrepancy(
    reference: Tensor | Rows, generated: Tensor | Rows, sigma: float = 10.0, normalised: bool = True, block: int = BLOCK,
    dealt: bool = False,
) -> float:
    """MMD^2 = mean_{ij} k(x_i, x_j) + mean_{ij} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),  k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    The V-statistic: pairs of a row with itself count, so it is never negative, 0 for equal sets, and biased upwards by about
    (1 - mean k) (1 / N + 1 / M). Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 5; for images Jayasumana et al. 2024,
    arXiv:2401.09603, who scale it by 1000. normalised: rows are brought to length 1 first. Raises InputError for N or M < 1.
    """  # fmt: skip
    reference, generated = as_rows(reference), as_rows(generated)
    if not sigma > 0:
        raise InputError(f"sigma = {sigma}: the Gaussian kernel needs a positive width.")
    check_pair(reference, generated, at_least=1)
    return discrepancy(reference, generated, partial(gaussian, sigma=sigma, normalised=normalised), False, block, dealt)


def polynomial(x: Tensor, y: Tensor, degree: int) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(degree)


def gaussian(x: Tensor, y: Tensor, sigma: float, normalised: bool) -> Tensor:
    if normalised:
        x, y = (torch.nn.functional.normalize(rows, dim=1) for rows in (x, y))
    squared = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * x @ y.T
    return (squared.clamp(min=0) / (-2 * sigma**2)).exp()


class Task(NamedTuple):
    """The kernel's sum over one block of rows of a against all of b, or, within one set, against the blocks from its own onwards."""

    a: Rows
    b: Rows
    start: int
    within: bool


def discrepancy(
    reference: Rows, generated: Rows, kernel: Kernel, unbiased: bool, block: int = BLOCK, dealt: bool = False
) -> float:  # fmt: skip
    """MMD^2 under the kernel, with pairs of a row with itself left out where `unbiased`."""
    pairs = ((reference, reference, True), (generated, generated, True), (reference, generated, False))
    tasks = [Task(a, b, start, within) for a, b, within in pairs for start in range(0, len(a), block)]
    sums = dealt_values(tasks, lambda task: kernel_sum(task, kernel, block, unbiased), dealt)
    n, m, first = len(reference), len(generated), -(-len(reference) // block)
    second = first + -(-len(generated) // block)
    own = int(unbiased)
    means = sums[:first].sum() / (n * (n - own)), sums[first:second].sum() / (m * (m - own)), sums[second:].sum() / (n * m)
    return float(means[0] + means[1] - 2 * means[2])


def kernel_sum(task: Task, kernel: Kernel, block: int, without_itself: bool) -> Tensor:
    """The sum of a task, float64. Within one set the blocks after a row's own stand for those before them too."""
    rows, total = piece(task.a, task.start, block), torch.zeros((), dtype=torch.float64)
    for start in range(task.start if task.within else 0, len(task.b), block):
        own = task.within and start == task.start
        values = kernel(rows, rows if own else piece(task.b, start, block))
        total = total + values.sum() * (2 if task.within and not own else 1)
        if own and without_itself:
            total = total - values.diagonal().sum()
    return total


def check_degree(degree: int) -> None:
    if degree < 1:
        raise InputError(f"degree = {degree}: the polynomial kernel needs a degree of at least 1.")


def check_subsets(num_reference: int, num_generated: int, size: int) -> None:
    if size < 2:
        raise InputError(f"subset_size = {size}: the kernel distance needs at least 2 images in a subset.")
    for count, name in ((num_reference, "reference"), (num_generated, "generated")):
        if count < size:
            raise InputError(
                f"{count} {name} images are too few for subsets of {size}: give at least {size} images, a smaller subset_size, "
                "or subsets: 0 for all pairs."
            )
