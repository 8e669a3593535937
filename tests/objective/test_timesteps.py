"""Timesteps: distribution, stratification, importance, and wrong ranges."""

import pytest
import torch
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.timesteps import LogitNormal, Stratified, TimestepRange, Uniform

MANY = Rng(0, 0, range(8000))


def frequencies(sampler, num_timesteps):
    t = sampler(num_timesteps, MANY).t
    return torch.bincount(t, minlength=num_timesteps).double() / len(t)


def assert_distributed(found, expected):
    """Within 4.5 standard errors of a binomial in each of about ten places."""
    error = (expected * (1 - expected) / 8000).sqrt()
    assert bool(((found - expected).abs() <= 4.5 * error + 1e-12).all()), f"{found}\n{expected}"


def test_uniform_timesteps_are_uniform():
    assert_distributed(frequencies(Uniform(), 10), torch.full((10,), 0.1, dtype=torch.float64))


def test_stratified_timesteps_put_one_sample_into_each_stratum():
    for step in range(20):
        t = Stratified()(1000, Rng(0, step, range(8))).t
        assert (t // 125).sort().values.tolist() == list(range(8))


def test_a_stratified_sample_is_uniform_by_itself():
    t = torch.cat([Stratified()(10, Rng(0, step, [3], batch_size=8)).t for step in range(3000)])
    error = (0.1 * 0.9 / 3000) ** 0.5
    assert_close(
        torch.bincount(t, minlength=10) / 3000, torch.full((10,), 0.1), absolute=4.5 * error
    )


def test_range_draws_within_its_ends_and_reaches_both():
    found = frequencies(TimestepRange(first=3, last=6), 10)
    assert_distributed(found, torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 0]).double() / 4)


def test_range_of_one_timestep_draws_it():
    assert set(TimestepRange(first=999, last=999)(1000, MANY).t.tolist()) == {999}


def test_range_that_runs_backwards_is_rejected():
    with pytest.raises(InputError) as error:
        TimestepRange(first=5, last=4)
    assert (
        str(error.value)
        == "timesteps range: first = 5 is greater than last = 4. Write the smaller one as first."
    )


@pytest.mark.parametrize("last", [100, 999])
def test_range_beyond_the_schedule_is_rejected(last):
    with pytest.raises(InputError) as error:
        TimestepRange(first=0, last=last)(100, MANY)
    assert (
        str(error.value) == f"timesteps range: last = {last}, but the schedule has 100 timesteps. "
        "Write last: 99 or less."
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 1.7)])
def test_logit_normal_timesteps_follow_their_stated_probability(mean, std):
    sampler = LogitNormal(mean, std)
    expected = sampler.probability(torch.arange(10), 10)

    assert_close(expected.sum(), 1.0, absolute=1e-12)
    assert_distributed(frequencies(sampler, 10), expected)


def test_logit_normal_probability_is_the_normal_distribution_between_logits():
    normal = torch.distributions.Normal(torch.tensor(0.8, dtype=torch.float64), 0.5)
    edges = torch.arange(1, 10, dtype=torch.float64) / 10
    below = torch.cat([torch.zeros(1), normal.cdf((edges / (1 - edges)).log()), torch.ones(1)])

    assert_close(
        LogitNormal(0.8, 0.5).probability(torch.arange(10), 10), below.diff(), absolute=1e-14
    )


def test_logit_normal_as_published_has_no_importance_weights():
    assert bool((LogitNormal()(1000, MANY).importance == 1).all())


def test_unbiased_logit_normal_weighs_by_uniform_over_its_own_probability():
    sampler = LogitNormal(0.3, 1.2, unbiased=True)
    drawn = sampler(16, MANY)

    assert torch.equal(drawn.t, LogitNormal(0.3, 1.2)(16, MANY).t)
    assert_close(
        drawn.importance * sampler.probability(drawn.t, 16),
        torch.full((8000,), 1 / 16),
        relative=1e-13,
    )
