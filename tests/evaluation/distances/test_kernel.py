"""Kernel distances against double sums, torchmetrics, their expectation, and closed forms."""

import math

import pytest
import torch
from helpers.rows import filed_rows
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from difftrain.core.errors import InputError
from difftrain.evaluation import kernel_distance
from difftrain.evaluation.distances.kernel import (
    discrepancy,
    gaussian_discrepancy,
    kernel_distances,
    polynomial,
)
from difftrain.evaluation.rows import RowsInMemory


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(x: Tensor, y: Tensor, degree: int) -> float:
    """The estimator as its definition reads, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return float(a.dot(b) / len(a) + 1) ** degree

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("block", [1, 4, 1000])
def test_blocks_sum_to_the_definition(degree, block):
    x, y = normal(9, 5), normal(7, 5, seed=1) + 0.5

    assert (
        abs(kernel_distance(x, y, degree, block=block) - written_out(x, y, degree)) < 1e-12
    )  # rounding of sums of order 10


def test_it_is_torchmetrics_function_of_the_same_rows():
    x, y = normal(50, 12), normal(50, 12, seed=1) * 1.2

    assert abs(kernel_distance(x, y, degree=3, block=16) - float(poly_mmd(x, y, degree=3))) < 1e-12


def test_rows_in_a_file_give_what_rows_in_memory_give(tmp_path):
    x, y = normal(30, 5).float(), normal(20, 5, seed=1).float()

    filed = filed_rows(x, tmp_path / "x", 4)
    assert kernel_distance(filed, y, block=7) == kernel_distance(x, y, block=7)


def test_subsets_of_all_rows_are_the_whole():
    x, y = normal(40, 6), normal(40, 6, seed=1) + 0.2

    found = kernel_distances(x, y, subsets=3, subset_size=40)

    torch.testing.assert_close(
        found, torch.full((3,), kernel_distance(x, y), dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_subsets_average_to_all_pairs_and_depend_on_the_seed_alone():
    x, y = normal(60, 3), normal(80, 3, seed=1) + 0.4
    found = kernel_distances(x, y, subsets=400, subset_size=20)

    assert (
        abs(found.mean() - kernel_distance(x, y)) < 4 * found.std() / 400**0.5
    )  # four standard errors
    assert found.std() > 0
    assert torch.equal(kernel_distances(x, y, subsets=3, subset_size=20), found[:3])
    assert not torch.equal(kernel_distances(x, y, subsets=3, subset_size=20, seed=1), found[:3])


def test_a_subset_repeats_no_image():
    # Far from each other, rows only have large products with themselves: a row drawn twice would
    # be a pair of them.
    x = 100 * torch.eye(12, dtype=torch.float64)

    # Without repetition each pair within a set and all but the common rows across have k = 1.
    found = kernel_distances(x, x + 0, subsets=50, subset_size=6)
    big, n = (100**2 / 12 + 1) ** 3, 6
    across = (2 - found) / 2  # mean k(x, y), where both means within are 1

    common = (across - 1) * n * n / (big - 1)
    torch.testing.assert_close(common, common.round(), rtol=0, atol=1e-6)
    assert 0 <= common.min() <= common.max() <= n


def test_memory_is_that_of_blocks():
    class Counted(RowsInMemory):
        most = 0

        def take(self, indices):
            Counted.most = max(Counted.most, len(indices))
            return super().take(indices)

    x, widths = Counted(normal(100, 3)), []

    def kernel(a, b):
        widths.append(max(len(a), len(b)))
        return polynomial(a, b, degree=3)

    discrepancy(x, x, kernel, unbiased=True, block=8)

    assert Counted.most == max(widths) == 8


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_the_gaussian_discrepancy_is_its_definition(normalised, block):
    x, y = normal(9, 5), normal(7, 5, seed=1) + 0.5
    a, b = (
        (x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)) if normalised else (x, y)
    )

    def mean(p, q):
        return sum(
            math.exp(-float((u - v).square().sum()) / (2 * 0.7**2)) for u in p for v in q
        ) / (len(p) * len(q))

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)  # pairs of a row with itself are counted
    assert (
        abs(gaussian_discrepancy(x, y, sigma=0.7, normalised=normalised, block=block) - expected)
        < 1e-14
    )


def test_the_gaussian_discrepancy_of_two_gaussians_has_a_closed_form():
    # E k(x, y) = (1 + 2 / s^2)^(-D/2) exp(-|m|^2 / (2 s^2 + 4)) for unit Gaussians m apart.
    s, shift, n = 1.5, 0.8, 3_000
    x, y = normal(n, 2), normal(n, 2, seed=1) + shift
    near = 1 / (1 + 2 / s**2)
    expected = 2 * near * (1 - math.exp(-2 * shift**2 / (2 * s**2 + 4))) + 2 * (1 - near) / n

    assert (
        abs(gaussian_discrepancy(x, y, sigma=s, normalised=False) - expected) < 0.02
    )  # standard error about 2 sqrt(0.1 / 3000) 0.4


def test_equal_sets_are_at_gaussian_discrepancy_zero():
    x = normal(40, 6)

    assert abs(gaussian_discrepancy(x, x.flip(0))) < 1e-14


def test_it_is_unbiased_where_the_sets_agree():
    values = torch.tensor(
        [kernel_distance(normal(20, 4, seed=s), normal(15, 4, seed=1000 + s)) for s in range(200)]
    )

    assert (
        abs(values.mean()) < 4 * values.std() / 200**0.5
    )  # four standard errors; the biased estimator is off by 30
    assert values.min() < 0


def test_it_tells_a_shift_by_its_closed_form():
    # Degree 1 compares means: |m1 - m2|^2 / D = 0.25.
    x, y = normal(4_000, 2), normal(4_000, 2, seed=1) + 0.5

    assert (
        abs(kernel_distance(x, y, degree=1) - 0.25) < 4 / 4_000**0.5
    )  # standard error: 2 * 0.5 * sqrt(2 / 4000) / sqrt(2)


def test_float32_features_are_summed_in_float64():
    x, y = normal(30, 8).float(), normal(30, 8, seed=1).float()

    assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())


def test_impossible_input_is_refused():
    with pytest.raises(InputError, match="1 generated samples are too few"):
        kernel_distance(normal(5, 3), normal(1, 3))
    with pytest.raises(InputError, match="4 columns, expected 3"):
        kernel_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(
        InputError,
        match=r"generated features: 5 of 5 rows are not finite \(samples 0, 1, 2, 3, 4\)",
    ):
        kernel_distance(normal(5, 3), normal(5, 3) / 0)
    with pytest.raises(InputError, match="degree = 0"):
        kernel_distance(normal(5, 3), normal(5, 3), degree=0)
    with pytest.raises(
        InputError, match=r"7 generated samples are too few for subsets of 8. Give at least 8"
    ):
        kernel_distances(normal(9, 3), normal(7, 3), subset_size=8)
    with pytest.raises(InputError, match="subset_size = 1"):
        kernel_distances(normal(9, 3), normal(7, 3), subset_size=1)
    with pytest.raises(InputError, match="sigma = 0"):
        gaussian_discrepancy(normal(9, 3), normal(7, 3), sigma=0)
