"""Learned variance: interpolation, bound and messages, against other ways to the same numbers."""

import math

import pytest
import torch
from helpers.support import assert_close, images

from difftrain.core.errors import InputError
from difftrain.objective.parameterization import Estimate
from difftrain.objective.schedule import NoiseSchedule, diffuse
from difftrain.objective.transitions import beta, posterior
from difftrain.objective.types import Batch
from difftrain.objective.variance import (
    FixedVariance,
    LearnedRange,
    normal_kl,
    pixel_log_likelihood,
)

SCHEDULE = NoiseSchedule.linear(1000)
T = torch.tensor([1, 300, 999])
X0 = images(3)
X_T = diffuse(X0, images(3, seed=1), SCHEDULE.level(T))


def bound(v, x0_hat=X0, t=T, x0=X0, x_t=X_T, **arguments):
    predicted = torch.full_like(x0, v) if isinstance(v, float) else v
    return LearnedRange(**arguments).bound(
        Batch(x0), t, x_t, Estimate(x0_hat, x0_hat), predicted, SCHEDULE
    )


def test_bound_is_zero_for_the_true_image_with_the_posterior_variance():
    assert_close(bound(-1.0), torch.zeros(3), absolute=1e-10)


@pytest.mark.parametrize(("v", "share"), [(1.0, 1.0), (0.0, 0.5), (-0.5, 0.25)])
def test_bound_is_the_divergence_of_two_normal_distributions_in_bits(v, share):
    level, before = SCHEDULE.level(T), SCHEDULE.level_before(T)
    true, small = posterior(X0, X_T, level, before), posterior(X0, X_T, level, before).variance
    # The geometric mean that v interpolates.
    variance = beta(level, before) ** share * small ** (1 - share)
    shift = torch.full_like(X0, 0.1)
    mean = posterior(X0 + shift, X_T, level, before).mean

    def normal(mean, variance):
        return torch.distributions.Normal(mean, variance.sqrt()[:, None, None, None])

    nats = torch.distributions.kl_divergence(
        normal(true.mean, true.variance), normal(mean, variance)
    ).mean((1, 2, 3))
    # exp(r) - 1 - r cancels.
    assert_close(bound(v, X0 + shift), nats / math.log(2), relative=1e-9, absolute=1e-15)


def test_bound_at_t_0_is_the_negative_log_likelihood_with_the_variances_of_t_1():
    t = torch.zeros(1).long()
    x0, one = torch.full((1, 1, 1, 1), 3 / 255 * 2 - 1, dtype=torch.float64), torch.ones(1).long()
    x_t = diffuse(x0, torch.full_like(x0, 0.4), SCHEDULE.level(t))
    x0_hat = x0 + 0.003
    posterior_1 = posterior(x0, x_t, SCHEDULE.level(one), SCHEDULE.level_before(one)).variance

    found = bound(-1.0, x0_hat, t, x0, x_t)

    # below t = 0 lies the image: the mean is x0_hat, the mass that of a bin of 1/127.5
    normal = torch.distributions.Normal(x0_hat, posterior_1.sqrt())
    mass = normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)
    # The published tanh approximation of the cdf.
    assert_close(found, -mass.log().flatten() / math.log(2), relative=2e-3)


def test_pixel_likelihoods_of_all_256_values_sum_to_one():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    for mean, std in [(0.1, 0.05), (0.99, 0.02), (-1.2, 0.3)]:
        log_mass = pixel_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, math.log(std))
        )
        assert_close(log_mass.exp().sum(), 1.0, absolute=1e-9)


def test_normal_kl_is_torchs():
    a, b = torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-0.1, 0.8)
    found = normal_kl(
        *(
            torch.tensor(v, dtype=torch.float64)
            for v in (0.3, 2 * math.log(0.5), -0.1, 2 * math.log(0.8))
        )
    )

    assert_close(found, torch.distributions.kl_divergence(a, b), relative=1e-6)  # theirs in float32


def test_bound_scales_with_its_weight_and_the_number_of_timesteps():
    x0_hat = X0 + 0.1
    assert_close(
        bound(0.3, x0_hat, weight=0.004), 4 * bound(0.3, x0_hat, weight=0.001), relative=1e-14
    )
    short = NoiseSchedule(SCHEDULE.alpha[:500], SCHEDULE.sigma[:500], {})
    t = torch.tensor([1, 300, 400])
    bounds = [
        LearnedRange().bound(Batch(X0), t, X_T, Estimate(x0_hat, x0_hat), torch.zeros_like(X0), s)
        for s in (SCHEDULE, short)
    ]
    assert_close(bounds[0], 2 * bounds[1], relative=1e-14)


def test_bound_trains_the_variance_and_never_the_mean():
    v = torch.zeros_like(X0).requires_grad_(True)
    x0_hat = (X0 + 0.1).requires_grad_(True)

    bound(v, x0_hat).sum().backward()

    assert x0_hat.grad is None
    assert bool((v.grad != 0).all())


def test_bound_has_finite_gradient_at_every_timestep():
    v = torch.zeros(1000, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    t, x0 = torch.arange(1000), images(1000, 1, 2)
    found = bound(v, x0 + 0.1, t, x0, diffuse(x0, images(1000, 1, 2, seed=1), SCHEDULE.level(t)))
    found.sum().backward()

    assert bool(found.isfinite().all())
    assert bool(v.grad.isfinite().all())


def test_learned_range_splits_prediction_first():
    output = torch.arange(8.0).reshape(1, 4, 1, 2)
    prediction, variance = LearnedRange().split(output, torch.zeros(1, 2, 1, 2))

    assert torch.equal(prediction, output[:, :2])
    assert torch.equal(variance, output[:, 2:])
    assert FixedVariance().split(output, output) == (output, None)


@pytest.mark.parametrize(
    ("part", "channels", "message"),
    [
        (
            FixedVariance(),
            6,
            "the model returns 6 channels for an input of 3, but 3 are expected. "
            "Write variance: {type: learned_range}.",
        ),
        (
            LearnedRange(),
            3,
            "the model returns 3 channels for an input of 3, but 6 are expected. "
            "Write variance: {type: fixed}.",
        ),
        (
            FixedVariance(),
            4,
            "the model returns 4 channels for an input of 3, but 3 are expected. "
            "Build the model with out_channels: 3.",
        ),
        (
            LearnedRange(),
            4,
            "the model returns 4 channels for an input of 3, but 6 are expected. "
            "Build the model with out_channels: 6.",
        ),
    ],
)
def test_a_wrong_number_of_output_channels_names_the_remedy(part, channels, message):
    with pytest.raises(InputError) as error:
        part.split(torch.zeros(1, channels, 2, 2), torch.zeros(1, 3, 2, 2))
    assert str(error.value) == message
