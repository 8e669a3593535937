"""Feature statistics against numpy, the Frechet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.statistics import factor, merged, packed
from difftrain.registry import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def with_moments(mean: Tensor, cov: Tensor, count: int = 1000) -> FeatureStatistics:
    """Statistics with exactly this mean and covariance."""
    statistics = FeatureStatistics(len(mean))
    statistics.moments = packed(count, mean, cov * (count - 1))
    return statistics


def rotated(variances: Tensor, seed: int) -> Tensor:
    """A covariance [D, D] with these eigenvalues in random directions."""
    turn = torch.linalg.qr(normal(len(variances), len(variances), seed=seed)).Q
    return turn * variances @ turn.T


def test_mean_and_covariance_are_numpys():
    features = normal(50, 6) @ normal(6, 6, seed=1) + 3

    found = statistics_of(*features.split([1, 20, 0, 29]))

    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.mean(0), atol=1e-13)  # rounding of float64
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), atol=1e-12)


def test_covariance_survives_a_mean_far_from_zero():
    features = normal(400, 4)
    away = features + 2.0**26  # float64 holds the shifted values to 2^-27 = 7e-9; raw sums of squares would lose all of the variance

    near, far = statistics_of(features), statistics_of(*away.split(37))

    np.testing.assert_allclose(far.cov, near.cov, atol=1e-7)


def test_merging_does_not_depend_on_the_grouping():
    features = normal(60, 5)
    parts = [statistics_of(part).moments for part in features.split([2, 17, 41])]

    joined = merged(torch.stack([merged(torch.stack(parts[:2])), FeatureStatistics(5).moments, parts[2]]))

    np.testing.assert_allclose(joined, statistics_of(features).moments, atol=1e-12)


def test_reset_forgets_everything():
    statistics = statistics_of(normal(9, 3))
    statistics.reset()
    statistics.update(normal(5, 3, seed=1))

    torch.testing.assert_close(statistics.cov, statistics_of(normal(5, 3, seed=1)).cov, rtol=0, atol=0)


def test_a_saved_file_gives_the_same_statistics(tmp_path):
    saved = statistics_of(normal(30, 4))
    saved.save(tmp_path / "folder" / "reference.npz", {"features": "pixels", "resize": None})

    loaded = FeatureStatistics.load(tmp_path / "folder" / "reference.npz")

    assert loaded.count == 30
    assert loaded.protocol == {"features": "pixels", "resize": None}
    assert abs(frechet_distance(saved, loaded)) < 1e-12
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["reference.npz"]
    with np.load(tmp_path / "folder" / "reference.npz") as file:
        assert sorted(file.files) == ["mu", "num_samples", "protocol", "sigma"]
        np.testing.assert_array_equal(file["sigma"], saved.cov)


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a zip file")

    with pytest.raises(InputError, match="sigma and num_samples and protocol is missing"):
        FeatureStatistics.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match=r"text\.npz: cannot be read"):
        FeatureStatistics.load(tmp_path / "text.npz")


def test_broken_features_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(InputError, match=r"have 4 columns, expected 3"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"must be \[N, D\]"):
        statistics.update(torch.zeros(3))
    with pytest.raises(InputError, match="1 of 2 rows are not finite"):
        statistics.update(torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]))
    assert statistics.count == 0


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="1 samples are too few"):
        frechet_distance(statistics_of(normal(1, 3)), statistics_of(normal(9, 3)))
    with pytest.raises(InputError, match="width 3 and 4"):
        frechet_distance(statistics_of(normal(9, 3)), statistics_of(normal(9, 4)))


@pytest.mark.parametrize("seed", range(3))
def test_distance_of_commuting_gaussians_has_a_closed_form(seed):
    # Same eigenvectors: |m1 - m2|^2 + sum (sqrt v1 - sqrt v2)^2.
    first, second = normal(7, seed=seed).exp(), normal(7, seed=seed + 9).exp()
    a = with_moments(normal(7, seed=1), rotated(first, seed=5))
    b = with_moments(normal(7, seed=2), rotated(second, seed=5))

    expected = (a.mean - b.mean).square().sum() + (first.sqrt() - second.sqrt()).square().sum()

    assert abs(frechet_distance(a, b) - float(expected)) < 1e-12  # rounding of sums of order 10


def test_distance_of_samples_approaches_that_of_their_gaussians():
    first, second, shift = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 1, 9]).double(), torch.tensor([2.0, 0, 0]).double()
    a = statistics_of(normal(200_000, 3) * first.sqrt())
    b = statistics_of(normal(200_000, 3, seed=1) * second.sqrt() + shift)

    # 4 + (1 - 2)^2 + (2 - 1)^2 = 6. Largest error: 2 * 2 * (error of the mean, sqrt(5 / 200000) = 0.005); 4 of these.
    assert abs(frechet_distance(a, b) - 6) < 0.08


@pytest.mark.parametrize(("samples_a", "samples_b"), [(200, 300), (200, 5), (4, 6), (2, 2), (16, 17)])
def test_distance_agrees_with_general_eigenvalues_and_the_matrix_root(samples_a, samples_b):
    mix = normal(16, 16, seed=3)
    a, b = statistics_of(normal(samples_a, 16) @ mix), statistics_of(normal(samples_b, 16, seed=1) + 0.3)
    product = (a.cov @ b.cov).numpy()
    apart = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace())
    by_eigenvalues = apart - 2 * np.sqrt(np.linalg.eigvals(product).real.clip(0)).sum()
    by_root = apart - 2 * np.trace(scipy.linalg.sqrtm(product)).real

    # The references take roots of up to 16 zero eigenvalues that carry rounding, 1e-16 of the largest (1e4): 16 * 2 * sqrt(1e-12).
    assert abs(frechet_distance(a, b) - by_eigenvalues) < 3e-5
    assert abs(frechet_distance(a, b) - by_root) < 3e-5
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-11


@pytest.mark.parametrize("num_samples", [2, 10, 40, 64, 65, 500])
def test_equal_statistics_are_at_distance_zero(num_samples):
    a = statistics_of(normal(num_samples, 64) * torch.logspace(-4, 1, 64).double())

    assert abs(frechet_distance(a, a)) < 1e-12 * float(a.cov.trace())  # exact up to rounding, whatever the rank


def test_constant_features_have_a_distance():
    assert frechet_distance(statistics_of(torch.ones(5, 3)), statistics_of(torch.full((4, 3), 2.0))) == 3
    flat = statistics_of(torch.ones(5, 3))
    spread = statistics_of(normal(9, 3) + 1)
    expected = (spread.mean - 1).square().sum() + spread.cov.trace()
    assert abs(frechet_distance(flat, spread) - float(expected)) < 1e-14


@pytest.mark.parametrize("seed", range(8))  # Cholesky's factorisation of a singular matrix fails for some and ends in noise for others
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_the_factor_multiplies_back_to_the_covariance_and_has_its_rank(rank, seed):
    variances = torch.cat([normal(rank).exp(), torch.zeros(8 - rank, dtype=torch.float64)])
    cov = rotated(variances, seed)

    found = factor(cov)

    assert found.shape == (8, rank)
    np.testing.assert_allclose(found @ found.T, cov, atol=1e-14)
