"""Precision, recall, density and coverage against full distance matrices and counts by hand."""

import pytest
import torch
from helpers.rows import filed_rows
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import precision_recall
from difftrain.evaluation.distances.neighbours import density_coverage
from difftrain.evaluation.rows import RowsInMemory


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inside(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """[points, centres]: which points lie in which ball, from scikit-learn's neighbours."""
    radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
    distances = (points[:, None].double() - centres[None].double()).norm(dim=2)
    return distances <= torch.from_numpy(radii)


def share(inside_any: Tensor) -> float:
    return float(inside_any.double().mean())


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_all_four_agree_with_a_direct_count(block, k):
    reference, generated = normal(60, 5), normal(40, 5, seed=1) * 0.6 + 0.4
    held = inside(generated, reference, k)

    found = precision_recall(reference, generated, k, block)
    assert found == (share(held.any(dim=1)), share(inside(reference, generated, k).any(dim=1)))
    density, coverage = density_coverage(reference, generated, k, block)
    assert density == pytest.approx(float(held.sum()) / (k * len(generated)), abs=1e-14)
    assert coverage == share(held.any(dim=0))


def test_rows_in_a_file_give_what_rows_in_memory_give(tmp_path):
    reference, generated = normal(30, 5), normal(20, 5, seed=1)
    filed = filed_rows(reference, tmp_path / "rows")

    for score in (precision_recall, density_coverage):
        assert score(filed, generated, block=7) == score(reference, generated)


def test_no_more_than_a_block_of_rows_is_read_at_once():
    class Counted(RowsInMemory):
        most = 0

        def take(self, indices):
            Counted.most = max(Counted.most, len(indices))
            return super().take(indices)

    density_coverage(Counted(normal(50, 3)), Counted(normal(70, 3)), block=8)

    assert Counted.most == 8


def test_a_case_on_a_line():
    # With one neighbour the balls about 0, 1, 3 are [-1, 1], [0, 2], [1, 5];
    # those about 1.5, 2.5, 20 are [0.5, 2.5], [1.5, 3.5], [2.5, 37.5].
    reference, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [2.5], [20.0]])

    assert precision_recall(reference, generated, 1) == pytest.approx((2 / 3, 2 / 3), abs=1e-12)


def test_equal_sets_have_full_precision_and_recall_even_as_one_point_far_away():
    cloud = normal(30, 4)
    assert precision_recall(cloud, cloud.flip(0)) == (1, 1)
    one_point = torch.full((10, 4), 1234.567)
    assert precision_recall(one_point, one_point[:6]) == (1, 1)


@pytest.mark.parametrize("num_features", [7, 50, 300])
def test_copies_have_balls_that_hold_them(num_features):
    # Radii and distances are all 0, but for rounding, which differs with the shape of the product.
    points = normal(7, num_features, seed=num_features)

    assert precision_recall(points.repeat(5, 1), points.repeat(40, 1)) == (1, 1)


def test_sets_far_apart_have_none():
    assert precision_recall(normal(30, 4), normal(30, 4, seed=1) + 100) == (0, 0)


def test_density_and_coverage_on_a_line():
    # With one neighbour the balls about 0, 1, 3 are [-1, 1], [0, 2], [1, 5]; 1.5 lies in two, 2.5
    # in one, 20 in none.
    reference, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [2.5], [20.0]])

    assert density_coverage(reference, generated, 1) == pytest.approx((1, 2 / 3), abs=1e-12)


def test_density_and_coverage_of_one_distribution_have_the_published_expectations():
    # Density 1; coverage 1 - (M - 1) ... (M - k) / ((2M - 1) ... (2M - k)) = 1 - 2^-k for large
    # M. Naeem et al., section 3.3.
    found = torch.tensor(
        [
            density_coverage(normal(200, 3, seed=s), normal(200, 3, seed=1000 + s), 3)
            for s in range(20)
        ]
    ).double()
    expected = torch.tensor([1, 1 - (199 * 198 * 197) / (399 * 398 * 397)]).double()

    assert (
        (found.mean(dim=0) - expected).abs() < 4 * found.std(dim=0) / 20**0.5
    ).all()  # four standard errors


def test_density_counts_copies_in_closed_balls():
    points = normal(7, 50)

    # Every ball has radius 0 and holds the 40 copies of its centre; each generated row lies in
    # the 5 balls of its copies.
    assert density_coverage(points.repeat(5, 1), points.repeat(40, 1), 3) == (5 / 3, 1)


def test_balls_are_found_far_from_zero():
    a, b = normal(40, 6).double(), normal(50, 6, seed=1).double()
    # Squares of 1e15 leave nothing of squared distances of 1, unless the mean is subtracted first.
    away = 2.0**24

    assert density_coverage(a + away, b + away) == density_coverage(a, b)
    assert precision_recall(a + away, b + away) == precision_recall(a, b)


def test_impossible_input_is_refused():
    with pytest.raises(
        InputError, match="3 generated samples are too few: this score needs at least 4"
    ):
        precision_recall(normal(10, 2), normal(3, 2), neighbours=3)
    with pytest.raises(InputError, match="neighbours = 0"):
        precision_recall(normal(10, 2), normal(10, 2), neighbours=0)
    with pytest.raises(InputError, match="3 columns, expected 2"):
        density_coverage(normal(9, 2), normal(9, 3))
    with pytest.raises(
        InputError, match="5 reference samples are too few: this score needs at least 6"
    ):
        density_coverage(normal(5, 2), normal(9, 2))
    broken = normal(3000, 2)
    broken[[1, 1500, 2999]] = float("nan")  # in different blocks
    with pytest.raises(
        InputError,
        match=r"generated features: 3 of 3000 rows are not finite \(samples 1, 1500, 2999\)",
    ):
        precision_recall(normal(9, 2), broken)
