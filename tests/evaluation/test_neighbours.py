"""Precision, recall and nearest distances against full distance matrices and cases that can be counted by hand."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from difftrain.evaluation import neighbours, precision_recall
from difftrain.evaluation.neighbours import nearest_distances
from difftrain.registry import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points in a k-nearest-neighbour ball, from scikit-learn's neighbours and direct differences."""
    radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
    distances = (points[:, None].double() - centres[None].double()).norm(dim=2)
    return float((distances <= torch.from_numpy(radii)).any(dim=1).double().mean())


@pytest.fixture(params=[1, 64, neighbours.BLOCK_ENTRIES])
def any_block(request, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ENTRIES", request.param)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_a_direct_count(any_block, k):
    reference, generated = normal(60, 5), normal(40, 5, seed=1) * 0.6 + 0.4

    assert precision_recall(reference, generated, k) == (inside(generated, reference, k), inside(reference, generated, k))


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


def test_nearest_distances_agree_with_direct_differences(any_block):
    a, b = normal(17, 6), normal(23, 6, seed=1) + 50

    expected = (a[:, None].double() - b[None].double()).norm(dim=2).min(dim=1).values

    torch.testing.assert_close(nearest_distances(a, b), expected, rtol=0, atol=1e-12)  # rounding at distances of 100


def test_neighbours_are_found_far_from_zero():
    a, b = normal(40, 6).double(), normal(50, 6, seed=1).double()
    away = 2.0**27  # squares of 1e17 leave nothing of squared distances of 1, unless the mean is taken away first

    torch.testing.assert_close(nearest_distances(a + away, b + away), nearest_distances(a, b), rtol=0, atol=1e-6)  # inputs to 3e-8


def test_a_copy_is_at_distance_zero_exactly():
    b = normal(40, 9) * 1e3

    assert nearest_distances(b[5:9], b).tolist() == [0, 0, 0, 0]


def test_impossible_input_is_refused():
    with pytest.raises(InputError, match="3 generated images are too few: this score needs at least 4"):
        precision_recall(normal(10, 2), normal(3, 2), neighbours=3)
    with pytest.raises(InputError, match="neighbours = 0"):
        precision_recall(normal(10, 2), normal(10, 2), neighbours=0)
    with pytest.raises(InputError, match="3 columns, expected 2"):
        nearest_distances(normal(4, 3), normal(4, 2))
