"""The kernel distance against its double sum, its expectation, and a closed form."""

import pytest
import torch
from torch import Tensor

from difftrain.evaluation import kernel_distance
from difftrain.registry import InputError


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

    assert abs(kernel_distance(x, y, degree, block=block) - written_out(x, y, degree)) < 1e-12  # rounding of sums of order 10


def test_it_is_unbiased_where_the_sets_agree():
    values = torch.tensor([kernel_distance(normal(20, 4, seed=s), normal(15, 4, seed=1000 + s)) for s in range(200)])

    assert abs(values.mean()) < 4 * values.std() / 200**0.5  # four standard errors; the biased estimator is off by 30
    assert values.min() < 0


def test_it_tells_a_shift_by_its_closed_form():
    # Degree 1 compares means: |m1 - m2|^2 / D = 0.25.
    x, y = normal(4_000, 2), normal(4_000, 2, seed=1) + 0.5

    assert abs(kernel_distance(x, y, degree=1) - 0.25) < 4 / 4_000**0.5  # standard error: 2 * 0.5 * sqrt(2 / 4000) / sqrt(2)


def test_float32_features_are_summed_in_float64():
    x, y = normal(30, 8).float(), normal(30, 8, seed=1).float()

    assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())


def test_impossible_input_is_refused():
    with pytest.raises(InputError, match="1 generated images are too few"):
        kernel_distance(normal(5, 3), normal(1, 3))
    with pytest.raises(InputError, match="4 columns, expected 3"):
        kernel_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(InputError, match="generated features: 5 of 5 rows are not finite"):
        kernel_distance(normal(5, 3), normal(5, 3) / 0)
    with pytest.raises(InputError, match="degree = 0"):
        kernel_distance(normal(5, 3), normal(5, 3), degree=0)
