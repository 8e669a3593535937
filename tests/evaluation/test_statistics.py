"""Feature statistics against numpy, the Frechet distance against closed forms and scipy's matrix square root."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation import statistics as module
from difftrain.evaluation.rows import RowsInFile
from difftrain.evaluation.statistics import factor, merged, packed
from difftrain.evaluation.statistics import statistics_of as of_rows
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


def test_a_published_file_without_a_count_is_read_and_says_what_is_assumed(tmp_path):
    features = normal(30, 4)
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))

    loaded = FeatureStatistics.load(tmp_path / "fid.npz")

    assert (loaded.count, loaded.count_is_known) == (0, False)
    assert loaded.protocol["num_samples"] is None
    assert "ddof 1" in loaded.protocol["assumed"]
    assert loaded.others == {}
    other = statistics_of(normal(9, 4, seed=1))
    assert abs(frechet_distance(loaded, other) - frechet_distance(statistics_of(features), other)) < 1e-12
    with pytest.raises(InputError, match="does not say of how many images"):
        loaded.update(features)


def test_spatial_statistics_are_read_beside_the_others_and_the_images_are_not(tmp_path):
    features, spatial = normal(30, 4), normal(30, 3, seed=1)
    arrays = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=np.array([{}], dtype=object), **arrays)  # unreadable without pickle, so reading it would raise

    loaded = FeatureStatistics.load(tmp_path / "adm.npz")

    np.testing.assert_allclose(loaded.others["spatial"].cov, np.cov(spatial, rowvar=False), atol=1e-14)
    np.testing.assert_array_equal(loaded.others["spatial"].mean, spatial.mean(0))
    assert loaded.protocol["keys"] == "mu, sigma, mu_s, sigma_s"


def test_spatial_statistics_are_saved_as_they_are_published(tmp_path):
    saved = statistics_of(normal(30, 4))
    saved.others["spatial"] = statistics_of(normal(30, 3))
    saved.save(tmp_path / "both.npz", {})

    loaded = FeatureStatistics.load(tmp_path / "both.npz").others["spatial"]

    assert loaded.count == 30
    np.testing.assert_allclose(loaded.cov, saved.others["spatial"].cov, atol=1e-15)


def test_statistics_of_rows_in_a_file_are_those_of_rows_in_memory(tmp_path):
    features = normal(2500, 3).float()
    np.asarray(features).tofile(tmp_path / "rows")

    assert torch.equal(of_rows(RowsInFile(tmp_path / "rows", 3)).moments, of_rows(features).moments)
    assert frechet_distance(features, features + 1) == pytest.approx(3, abs=1e-6)  # features in float32


def test_broken_rows_are_counted_over_all_blocks():
    features = normal(3000, 2)
    features[[1500, 1501, 1502, 2900, 2950, 2999]] = float("nan")

    with pytest.raises(InputError, match=r"6 of 3000 rows are not finite \(images 1500, 1501, 1502, 2900, 2950, \.\.\.\)"):
        of_rows(features)


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a zip file")

    with (tmp_path / "stylegan.pkl").open("wb") as file:
        pickle.dump({"mean": np.zeros(3)}, file)
    np.savez(tmp_path / "crooked.npz", mu=np.zeros(2), sigma=np.array([[1, 0.5], [0.4, 1]]))
    np.savez(tmp_path / "broken.npz", mu=np.zeros(1), sigma=np.full((1, 1), np.nan))
    np.savez(tmp_path / "half.npz", mu=np.zeros(1), sigma=np.ones((1, 1)), mu_s=np.zeros(1))
    np.savez(tmp_path / "flat.npz", mu=np.zeros(3), sigma=np.ones(3))

    with pytest.raises(InputError, match="sigma is missing; it has mu"):
        FeatureStatistics.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match=r"a pickle can run any code .* numpy\.savez"):
        FeatureStatistics.load(tmp_path / "stylegan.pkl")
    with pytest.raises(InputError, match="sigma is not symmetric"):
        FeatureStatistics.load(tmp_path / "crooked.npz")
    with pytest.raises(InputError, match="not finite"):
        FeatureStatistics.load(tmp_path / "broken.npz")
    with pytest.raises(InputError, match="sigma_s is missing"):
        FeatureStatistics.load(tmp_path / "half.npz")
    with pytest.raises(InputError, match=r"mu must be \[D\] and sigma \[D, D\], got \[3\] and \[3\]"):
        FeatureStatistics.load(tmp_path / "flat.npz")
    with pytest.raises(InputError, match=r"text\.npz: cannot be read"):
        FeatureStatistics.load(tmp_path / "text.npz")


def test_broken_features_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(InputError, match=r"have 4 columns, expected 3"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"must be \[N, D\]"):
        statistics.update(torch.zeros(3))
    with pytest.raises(InputError, match=r"1 of 2 rows are not finite \(images 1\)"):
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


@pytest.mark.parametrize("case", range(20))
def test_distance_equals_the_general_eigenvalue_form_on_random_cases(case):
    """Of any ranks. As many eigenvalues of S1 S2 as its rank are taken: the others are zeros, of which only the rounding would count."""
    random = np.random.default_rng(case)
    width, samples_a, samples_b = (int(n) for n in random.integers([4, 2, 2], [40, 80, 80]))
    a = statistics_of(normal(samples_a, width, seed=2 * case) @ normal(width, width, seed=100 + case))
    b = statistics_of(normal(samples_b, width, seed=2 * case + 1) + float(random.normal()))
    rank = min(width, samples_a - 1, samples_b - 1)
    values = np.sort(np.linalg.eigvals((a.cov @ b.cov).numpy()).real)[::-1][:rank]
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.sqrt(values.clip(0)).sum()

    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_samples", [2, 10, 40, 64, 65, 500])
def test_equal_statistics_are_at_distance_zero(num_samples):
    a = statistics_of(normal(num_samples, 64) * torch.logspace(-4, 1, 64).double())

    assert abs(frechet_distance(a, a)) < 1e-12 * float(a.cov.trace())  # exact up to rounding, whatever the rank


def spread_out(num_samples: int, num_features: int, decades: float, seed: int) -> FeatureStatistics:
    """Of features whose standard deviations fall over so many decades, in random directions."""
    turn = torch.linalg.qr(normal(num_features, num_features, seed=99 + seed)).Q
    return statistics_of(normal(num_samples, num_features, seed=seed) * torch.logspace(0, -decades, num_features).double() @ turn)


@pytest.mark.parametrize("decades", [0, 1, 3, 5, 9])  # condition numbers from 1 to 1e18
@pytest.mark.parametrize(("samples_a", "samples_b"), [(300, 400), (20, 300), (300, 20), (9, 30), (40, 48)])
def test_distance_is_exact_whatever_the_ranks_and_conditions(samples_a, samples_b, decades):
    # The same 40 x 40 problem without squares: singular values of the product of the centred samples themselves.
    turn = torch.linalg.qr(normal(40, 40, seed=9)).Q
    x = normal(samples_a, 40) * torch.logspace(0, -decades, 40).double()
    y = normal(samples_b, 40, seed=1) * torch.logspace(0, -decades, 40).double() @ turn
    a, b = statistics_of(x), statistics_of(y)
    centred = [(rows - rows.mean(0)).numpy() / (len(rows) - 1) ** 0.5 for rows in (x, y)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False)
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * roots.sum()

    # A covariance that is known to eps of its largest value gives roots that are known to sqrt(eps) where they are smaller than that.
    limit = 1e-6 if decades > 3 else 1e-10
    assert abs(frechet_distance(a, b) - expected) < limit * expected
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-10 * expected


@pytest.mark.parametrize("decades", [0, 2, 4, 8])
@pytest.mark.parametrize("num_samples", [10, 200])
def test_equal_ill_conditioned_statistics_are_at_distance_zero(num_samples, decades):
    a = spread_out(num_samples, 64, decades, seed=0)

    assert abs(frechet_distance(a, a)) < 1e-8 * float(a.cov.trace())


def test_the_fast_way_is_taken_where_it_is_safe_and_no_further(monkeypatch):
    taken = []
    slow = torch.linalg.svdvals
    monkeypatch.setattr(module.torch.linalg, "svdvals", lambda matrix: taken.append(matrix.shape) or slow(matrix))

    frechet_distance(spread_out(900, 30, 0.5, 0), spread_out(900, 30, 0.5, 1))
    frechet_distance(spread_out(9, 30, 0.5, 0), spread_out(900, 30, 0.5, 1))  # the eight directions that there are
    assert taken == []
    small = spread_out(12, 30, 0.5, 0)
    frechet_distance(small, small)
    scales = torch.logspace(0, -5, 30).double()
    frechet_distance(statistics_of(normal(900, 30) * scales), statistics_of(normal(900, 30, seed=1) * scales))
    assert taken == [(11, 11), (30, 30)]


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
