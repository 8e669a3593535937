"""The Frechet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.distances import frechet as module
from difftrain.evaluation.distances.factors import factor
from difftrain.evaluation.distances.few_samples import FewSamples, summary_of_rows
from difftrain.evaluation.distances.moments import Moments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def with_moments(mean: Tensor, cov: Tensor, count: int = 1000) -> Moments:
    """Statistics with exactly this mean and covariance."""
    return Moments.known(mean, cov, count)


def rotated(variances: Tensor, seed: int) -> Tensor:
    """A covariance [D, D] with these eigenvalues in random directions."""
    turn = torch.linalg.qr(normal(len(variances), len(variances), seed=seed)).Q
    return turn * variances @ turn.T


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
    first, second, shift = (
        torch.tensor([1.0, 4, 9]).double(),
        torch.tensor([4.0, 1, 9]).double(),
        torch.tensor([2.0, 0, 0]).double(),
    )
    a = statistics_of(normal(200_000, 3) * first.sqrt())
    b = statistics_of(normal(200_000, 3, seed=1) * second.sqrt() + shift)

    # 4 + (1 - 2)^2 + (2 - 1)^2 = 6. Largest error: 2 * 2 * (error of the mean, sqrt(5 / 200000) =
    # 0.005); 4 of these.
    assert abs(frechet_distance(a, b) - 6) < 0.08


@pytest.mark.parametrize(
    ("samples_a", "samples_b"), [(200, 300), (200, 5), (4, 6), (2, 2), (16, 17)]
)
def test_distance_agrees_with_general_eigenvalues_and_the_matrix_root(samples_a, samples_b):
    mix = normal(16, 16, seed=3)
    a, b = (
        statistics_of(normal(samples_a, 16) @ mix),
        statistics_of(normal(samples_b, 16, seed=1) + 0.3),
    )
    product = (a.cov @ b.cov).numpy()
    apart = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace())
    by_eigenvalues = apart - 2 * np.sqrt(np.linalg.eigvals(product).real.clip(0)).sum()
    by_root = apart - 2 * np.trace(scipy.linalg.sqrtm(product)).real

    # The references take roots of up to 16 zero eigenvalues that carry rounding, 1e-16 of the
    # largest (1e4): 16 * 2 * sqrt(1e-12).
    assert abs(frechet_distance(a, b) - by_eigenvalues) < 3e-5
    assert abs(frechet_distance(a, b) - by_root) < 3e-5
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-11


@pytest.mark.parametrize("case", range(20))
def test_distance_equals_the_general_eigenvalue_form_on_random_cases(case):
    """Of any ranks. As many eigenvalues of S1 S2 as its rank are taken: the others are zeros."""
    random = np.random.default_rng(case)
    width, samples_a, samples_b = (int(n) for n in random.integers([4, 2, 2], [40, 80, 80]))
    a = statistics_of(
        normal(samples_a, width, seed=2 * case) @ normal(width, width, seed=100 + case)
    )
    b = statistics_of(normal(samples_b, width, seed=2 * case + 1) + float(random.normal()))
    rank = min(width, samples_a - 1, samples_b - 1)
    values = np.sort(np.linalg.eigvals((a.cov @ b.cov).numpy()).real)[::-1][:rank]
    expected = (
        float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace())
        - 2 * np.sqrt(values.clip(0)).sum()
    )

    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_samples", [2, 10, 40, 64, 65, 500])
def test_equal_statistics_are_at_distance_zero(num_samples):
    a = statistics_of(normal(num_samples, 64) * torch.logspace(-4, 1, 64).double())

    assert abs(frechet_distance(a, a)) < 1e-12 * float(
        a.cov.trace()
    )  # exact up to rounding, whatever the rank


def spread_out(num_samples: int, num_features: int, decades: float, seed: int) -> FeatureStatistics:
    """Of features whose standard deviations fall over so many decades, in random directions."""
    turn = torch.linalg.qr(normal(num_features, num_features, seed=99 + seed)).Q
    return statistics_of(
        normal(num_samples, num_features, seed=seed)
        * torch.logspace(0, -decades, num_features).double()
        @ turn
    )


@pytest.mark.parametrize("decades", [0, 1, 3, 5, 9])  # condition numbers from 1 to 1e18
@pytest.mark.parametrize(
    ("samples_a", "samples_b"), [(300, 400), (20, 300), (300, 20), (9, 30), (40, 48)]
)
def test_distance_is_exact_whatever_the_ranks_and_conditions(samples_a, samples_b, decades):
    # The same 40 x 40 problem without squares: singular values of the product of the centred
    # samples themselves.
    turn = torch.linalg.qr(normal(40, 40, seed=9)).Q
    x = normal(samples_a, 40) * torch.logspace(0, -decades, 40).double()
    y = normal(samples_b, 40, seed=1) * torch.logspace(0, -decades, 40).double() @ turn
    a, b = statistics_of(x), statistics_of(y)
    centred = [(rows - rows.mean(0)).numpy() / (len(rows) - 1) ** 0.5 for rows in (x, y)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False)
    expected = (
        float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * roots.sum()
    )

    # A covariance that is known to eps of its largest value gives roots that are known to
    # sqrt(eps) where they are smaller than that.
    limit = 1e-6 if decades > 3 else 1e-10
    assert abs(frechet_distance(a, b) - expected) < limit * expected
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-10 * expected
    # Rows of no more samples than features are never squared.
    assert abs(frechet_distance(x, b) - expected) < limit * expected
    assert abs(frechet_distance(x, y) - expected) < limit * expected
    if samples_a <= 40 >= samples_b:
        assert abs(frechet_distance(x, y) - expected) < 1e-10 * expected


@pytest.mark.parametrize("decades", [0, 2, 4, 8])
@pytest.mark.parametrize("num_samples", [10, 200])
def test_equal_ill_conditioned_statistics_are_at_distance_zero(num_samples, decades):
    a = spread_out(num_samples, 64, decades, seed=0)

    assert abs(frechet_distance(a, a)) < 1e-8 * float(a.cov.trace())


def test_the_fast_way_is_taken_where_it_is_safe_and_no_further(monkeypatch):
    taken = []
    slow = torch.linalg.svdvals
    monkeypatch.setattr(
        module.torch.linalg, "svdvals", lambda matrix: taken.append(matrix.shape) or slow(matrix)
    )

    frechet_distance(spread_out(900, 30, 0.5, 0), spread_out(900, 30, 0.5, 1))
    frechet_distance(
        spread_out(9, 30, 0.5, 0), spread_out(900, 30, 0.5, 1)
    )  # the eight directions that there are
    assert taken == []
    small = spread_out(12, 30, 0.5, 0)
    frechet_distance(small, small)
    scales = torch.logspace(0, -5, 30).double()
    frechet_distance(
        statistics_of(normal(900, 30) * scales), statistics_of(normal(900, 30, seed=1) * scales)
    )
    assert taken == [(11, 11), (30, 30)]


@pytest.mark.parametrize("num", [2, 3, 17, 64, 65])
def test_rows_have_numpys_mean_and_covariance(num):
    rows = normal(num, 64) * torch.logspace(-2, 1, 64).double() + 100

    found = summary_of_rows(rows)

    assert isinstance(found, FewSamples) == (num <= 64)
    np.testing.assert_allclose(found.mean, rows.numpy().mean(0), rtol=1e-14)
    expected = np.cov(rows.numpy(), rowvar=False)
    np.testing.assert_allclose(found.cov, expected, atol=1e-12)
    np.testing.assert_allclose(found.variance, np.trace(expected), rtol=1e-12)
    onto = normal(64, 5, seed=2)
    np.testing.assert_allclose(
        found.projected(onto), (onto.T.numpy() @ expected @ onto.numpy()), atol=1e-10
    )
    left = found.factor()
    assert left.shape[1] == min(num - 1, 64)
    np.testing.assert_allclose(left @ left.T, expected, atol=1e-12)


@pytest.mark.parametrize("decades", [0, 2, 8])
def test_copied_rows_are_at_distance_zero(decades):
    rows = normal(20, 64) * torch.logspace(0, -decades, 64).double()
    copies = torch.cat([rows, rows])

    assert abs(frechet_distance(rows, rows)) < 1e-12 * float(summary_of_rows(rows).variance)
    # Two copies of each row have 38 / 39 of the covariance: ddof 1.
    scale = (1 - (38 / 39) ** 0.5) ** 2
    expected = scale * float(summary_of_rows(rows).variance)
    assert abs(frechet_distance(copies, rows) - expected) < 1e-12 * float(rows.square().sum())
    assert abs(frechet_distance(copies, copies)) < 1e-12 * float(rows.square().sum())


def test_few_rows_are_compared_without_a_matrix_of_all_features(monkeypatch):
    sizes = []
    for name in ("eigvalsh", "svdvals", "eigh", "cholesky_ex"):
        plain = getattr(torch.linalg, name)

        def watched(matrix, plain=plain):
            sizes.append(max(matrix.shape))
            return plain(matrix)

        monkeypatch.setattr(torch.linalg, name, watched)

    frechet_distance(normal(9, 300), normal(12, 300, seed=1))
    frechet_distance(normal(9, 300), normal(9, 300))
    frechet_distance(normal(9, 300), statistics_of(normal(400, 300, seed=1)))
    assert sizes
    assert max(sizes) < 12


def test_broken_or_single_rows_are_refused():
    broken = normal(4, 9)
    broken[2, 3] = torch.nan
    with pytest.raises(InputError, match=r"1 of 4 rows are not finite \(samples 2\)"):
        frechet_distance(broken, normal(4, 9))
    with pytest.raises(InputError, match="1 samples are too few"):
        frechet_distance(normal(1, 9), normal(4, 9))


def test_constant_features_have_a_distance():
    assert (
        frechet_distance(statistics_of(torch.ones(5, 3)), statistics_of(torch.full((4, 3), 2.0)))
        == 3
    )
    flat = statistics_of(torch.ones(5, 3))
    spread = statistics_of(normal(9, 3) + 1)
    expected = (spread.mean - 1).square().sum() + spread.cov.trace()
    assert abs(frechet_distance(flat, spread) - float(expected)) < 1e-14


@pytest.mark.parametrize(
    "seed", range(8)
)  # Cholesky's factorisation of a singular matrix fails for some and ends in noise for others
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_the_factor_multiplies_back_to_the_covariance_and_has_its_rank(rank, seed):
    variances = torch.cat([normal(rank).exp(), torch.zeros(8 - rank, dtype=torch.float64)])
    cov = rotated(variances, seed)

    found = factor(cov)

    assert found.shape == (8, rank)
    np.testing.assert_allclose(found @ found.T, cov, atol=1e-14)
