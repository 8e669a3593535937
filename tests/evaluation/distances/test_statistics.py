"""Feature statistics against numpy, and as a metric in a loop of one's own."""

import numpy as np
import pytest
import torch
from helpers.rows import filed_rows
from helpers.several import in_group, on_processes
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.distances.moments import merged_moments, moments_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_mean_and_covariance_are_numpys():
    features = normal(50, 6) @ normal(6, 6, seed=1) + 3

    found = statistics_of(*features.split([1, 20, 0, 29]))

    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.mean(0), atol=1e-13)  # rounding of float64
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), atol=1e-12)


def test_covariance_survives_a_mean_far_from_zero():
    features = normal(400, 4)
    # float64 holds the shifted values to 2^-27 = 7e-9; raw sums of squares would lose the variance.
    away = features + 2.0**26

    near, far = statistics_of(features), statistics_of(*away.split(37))

    np.testing.assert_allclose(far.cov, near.cov, atol=1e-7)


def test_merging_does_not_depend_on_the_grouping():
    features = normal(60, 5)
    parts = [statistics_of(part).packed for part in features.split([2, 17, 41])]

    joined = merged_moments(
        torch.stack([merged_moments(torch.stack(parts[:2])), FeatureStatistics(5).packed, parts[2]])
    )

    np.testing.assert_allclose(joined, statistics_of(features).packed, atol=1e-12)


def test_reset_forgets_everything():
    statistics = statistics_of(normal(9, 3))
    statistics.reset()
    statistics.update(normal(5, 3, seed=1))

    torch.testing.assert_close(
        statistics.cov, statistics_of(normal(5, 3, seed=1)).cov, rtol=0, atol=0
    )


def test_statistics_of_rows_in_a_file_are_those_of_rows_in_memory(tmp_path):
    features = normal(2500, 3).float()
    filed = filed_rows(features, tmp_path / "rows")

    assert torch.equal(moments_of(filed).packed, moments_of(features).packed)
    assert frechet_distance(features, features + 1) == pytest.approx(
        3, abs=1e-6
    )  # features in float32


def test_broken_rows_are_counted_over_all_blocks():
    features = normal(3000, 2)
    features[[1500, 1501, 1502, 2900, 2950, 2999]] = float("nan")

    with pytest.raises(
        InputError,
        match=r"6 of 3000 rows are not finite \(samples 1500, 1501, 1502, 2900, 2950, \.\.\.\)",
    ):
        moments_of(features)


def test_broken_features_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(InputError, match=r"have 4 columns, expected 3"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"must be \[N, D\]"):
        statistics.update(torch.zeros(3))
    with pytest.raises(InputError, match=r"1 of 2 rows are not finite \(samples 1\)"):
        statistics.update(torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]))
    assert statistics.count == 0


def test_it_is_a_metric_in_a_loop_of_ones_own():
    """update, compute and reset, as of any torchmetrics metric."""
    statistics = FeatureStatistics(4)
    for epoch in range(2):
        features = normal(30, 4, seed=epoch) + epoch
        for batch in torch.split(features, 8):
            statistics.update(batch)
        mean, cov = statistics.compute()

        np.testing.assert_allclose(mean, features.mean(0), atol=1e-14)
        np.testing.assert_allclose(cov, np.cov(features, rowvar=False), atol=1e-14)
        assert statistics.count == 30
        statistics.reset()
        assert statistics.count == 0


def test_it_goes_on_after_compute_and_forward_gives_the_values_of_the_batch():
    features = normal(20, 3)
    statistics = statistics_of(features[:8])
    statistics.compute()
    mean, cov = statistics(features[8:])

    torch.testing.assert_close(mean, features[8:].mean(0))
    torch.testing.assert_close(cov, torch.cov(features[8:].T))
    assert statistics.count == 20
    torch.testing.assert_close(statistics.compute()[1], torch.cov(features.T))


def test_merges_of_two_halves_are_the_whole():
    features = normal(50, 4) + 3
    first, second = statistics_of(features[:20]), statistics_of(features[20:])
    first.merge_state(second)

    assert first.count == 50
    torch.testing.assert_close(first.mean, features.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(first.cov, torch.cov(features.T), rtol=0, atol=1e-14)


def test_few_samples_have_no_covariance():
    with pytest.raises(
        InputError, match=r"1 samples are too few for this statistic: .* at least 2"
    ):
        statistics_of(normal(1, 3)).compute()
    with pytest.raises(InputError, match="num_features = 0: expected at least 1"):
        FeatureStatistics(0)


def on_one_process(rank: int, folder: str) -> None:
    """A loop on one of two processes, over unequal shares; what it found is left in `folder`."""
    with in_group(rank, 2, folder):
        statistics, found = FeatureStatistics(4), []
        for epoch in range(2):
            own = normal(30, 4, seed=epoch)[[slice(0, 11), slice(11, 30)][rank]]
            for batch in torch.split(own, 8):
                statistics.update(batch)
            found.append(statistics.compute())
            found.append(statistics.count)
            statistics.update(normal(10, 4, seed=9)[5 * rank : 5 * rank + 5])
            found.append(statistics.compute())
            statistics.reset()
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.distributed
def test_a_loop_on_two_processes_gives_the_whole_on_both(tmp_path):
    on_processes(on_one_process, 2, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = []
    for epoch, own in ((0, (11, 19)), (1, (11, 19))):
        features = normal(30, 4, seed=epoch)
        more = torch.cat([features, normal(10, 4, seed=9)])
        expected += [features, own, more]

    for rank in range(2):
        for given, whole in zip(found[rank], expected, strict=True):
            if isinstance(given, int):
                assert given == whole[rank]  # what this process holds
                continue
            mean, cov = given
            torch.testing.assert_close(mean, whole.mean(0), rtol=0, atol=1e-14)
            torch.testing.assert_close(cov, torch.cov(whole.T), rtol=0, atol=1e-14)
