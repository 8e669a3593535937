"""Exposure bias of perfect and of wrong networks against closed forms and stored numbers."""

import dataclasses
import math

import pytest
import scipy.stats
import torch
from helpers.subjects import COSINE, f64, gaussian_subject, subject, true_x0
from helpers.support import Gaussian, assert_close

from difftrain.diagnostics.exposure_bias import ExposureBias, residual
from difftrain.diagnostics.gathering import population_std, power_sums
from difftrain.diagnostics.gaussian_floor import gaussian_std, mean_of_std
from difftrain.diagnostics.spacing import spread_timesteps
from difftrain.diagnostics.within_groups import pooled_variance
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.variance import LearnedRange

RESPACED = spread_timesteps(1000, 20)


def real_floor(variance, step="ancestral", consecutive=True, schedule=COSINE):
    of = gaussian_subject(num=2, schedule=schedule)
    below = torch.tensor([-1, *RESPACED[:-1]])
    std = gaussian_std(of, f64([variance]), RESPACED, step, consecutive)
    return (std - schedule.level_before(below, steps=0).sigma) ** 2


def test_the_floor_has_the_stored_numbers_of_a_perfect_predictor_on_gaussian_data():
    """Data of std 0.5 and 1, 20 respaced ancestral steps, cosine schedule: found by simulation."""
    assert_close(
        real_floor(0.25)[[19, 15, 10, 5, 1]], [0, 0.0013, 0.0257, 0.1469, 0.4263], absolute=6e-5
    )
    assert_close(real_floor(1.0)[1], 1.7868, absolute=6e-5)


def test_delta_has_the_stored_number_of_three_rows():
    std = population_std(power_sums(f64([[1, 2], [3, 6], [5, 4]])), 3)

    assert_close(std, [1.632993161855452] * 2, relative=1e-14)
    assert_close((std.mean() - 0.5) ** 2, 1.2836735048112147, relative=1e-14)


@pytest.mark.parametrize(
    ("kind", "schedule", "step"),
    [
        ("v_prediction", COSINE, "ancestral"),
        ("epsilon", NoiseSchedule.linear(), "ancestral"),
        ("v_prediction", COSINE, "ddim"),
        ("flow_prediction", NoiseSchedule.flow(), "ddim"),
        ("flow_prediction", NoiseSchedule.flow(), "ancestral"),
    ],
)
def test_the_perfect_network_of_gaussian_data_scores_the_floor(kind, schedule, step):
    found = ExposureBias(num=2000, steps=12, step=step)(
        gaussian_subject(Gaussian(0.3, 0.7), 2000, schedule, kind, block_size=500)
    )
    sigma = f64(found["sigma"])

    for curve in (found["consecutive"], found["one_step"]):
        floor_std = (
            sigma + f64(curve["floor"]).sqrt()
        )  # p lies above sigma on Gaussian data, but for the ends
        floor_std = torch.where(
            (f64(curve["std"]) < sigma), sigma - f64(curve["floor"]).sqrt(), floor_std
        )
        assert_close(f64(curve["std"]), floor_std, relative=5 / (2 * 2000 * 8) ** 0.5)
        assert_close(f64(curve["delta"]), (f64(curve["std"]) - sigma) ** 2, relative=1e-12)
    assert_close(found["value"], f64(found["consecutive"]["delta"]).mean(), relative=1e-12)
    assert_close(found["floor"], f64(found["consecutive"]["floor"]).mean(), relative=1e-12)
    assert found["t"][0] == -1


def test_the_first_of_the_single_steps_is_the_first_of_the_chain_up_to_its_noise():
    found = ExposureBias(num=500, steps=10)(gaussian_subject(num=500))

    assert_close(found["one_step"]["floor"][-1], found["consecutive"]["floor"][-1], relative=1e-12)
    assert_close(found["one_step"]["std"][-1], found["consecutive"]["std"][-1], relative=0.05)
    assert found["one_step"]["std"][-1] != found["consecutive"]["std"][-1]


def test_a_network_that_knows_the_image_forgets_nothing():
    image = Gaussian().batch(1).x0
    of = subject(
        true_x0(image[0], COSINE, "v_prediction"),
        image.expand(400, *image.shape[1:]),
        kind="v_prediction",
    )
    found = ExposureBias(num=400, steps=10)(of)
    tolerance = 5 / (2 * 400 * 8) ** 0.5

    assert_close(
        f64(found["consecutive"]["std"]), f64(found["sigma"]), relative=tolerance, absolute=1e-6
    )
    short = 1 - (2 / 400) ** 0.5 * math.exp(math.lgamma(200) - math.lgamma(199.5))
    expected = (short * f64(found["sigma"])) ** 2  # the population std of 400 is that much short
    assert_close(f64(found["consecutive"]["floor"]), expected, absolute=1e-15)
    assert_close(f64(found["drift"]["error"]), torch.zeros(5), absolute=1e-5)


def test_the_floor_is_that_within_classes_for_a_conditional_network():
    """Two classes of one image each: a label says all. Without labels the images have a floor."""
    x0 = torch.ones(60, 1, 2, 4, dtype=torch.float64)
    labels = torch.arange(60) % 2
    x0[labels == 1] = -0.5

    def network(x, t, cond):
        return (
            torch.where((cond["class_labels"] == 1)[:, None, None, None], -0.5, 1.0)
            .expand_as(x)
            .to(x)
        )

    classes = ClassConditioning(2, 2)
    found = ExposureBias(num=60, steps=5)(
        subject(network, x0, kind="sample", labels=labels, conditioning=classes)
    )
    without = ExposureBias(num=60, steps=5)(subject(lambda x, t, cond: 0 * x, x0, kind="sample"))

    short = 1 - (2 / 60) ** 0.5 * math.exp(math.lgamma(30) - math.lgamma(29.5))
    expected = (short * f64(found["sigma"])) ** 2
    assert_close(f64(found["consecutive"]["floor"]), expected, absolute=1e-15)
    assert_close(found["consecutive"]["std"][0], 0.0, absolute=1e-7)
    assert without["floor"] > 0.01
    assert "within classes" in found["protocol"]["floor"]


def test_drift_is_the_error_of_the_answer_that_ends_the_chain():
    """x0_hat = x0 + 0.1 at every level: the last posterior mean is x0_hat itself."""
    image = Gaussian().batch(1).x0
    of = subject(
        true_x0(image[0] + 0.1, COSINE, "sample"), image.expand(8, *image.shape[1:]), kind="sample"
    )
    found = ExposureBias(num=8, steps=20)(of)["drift"]

    assert found["steps"] == [2, 6, 10, 14, 20]
    assert found["t"] == [RESPACED[n - 1] for n in (2, 6, 10, 14, 20)]
    assert_close(f64(found["error"]), torch.full((5,), 0.1), relative=1e-6)


def test_eps_norms_are_those_of_the_noise_that_is_predicted():
    """Data N(0, 1) stays N(0, 1): the optimal eps is sigma x_t.

    Its mean norm is sigma sqrt(2) Gamma(9/2) / Gamma(4) in 8 dimensions.
    """
    found = ExposureBias(num=2000, steps=40)(
        gaussian_subject(Gaussian(0.0, 1.0), 2000, block_size=500)
    )["eps_norm"]
    level = COSINE.level(torch.tensor(found["t"]))
    expected = level.sigma * math.sqrt(2) * math.gamma(4.5) / math.gamma(4)

    assert_close(
        f64(found["true"]), expected, relative=5 * 0.25 / 2000**0.5
    )  # std / mean of chi with 8 degrees is 0.25
    assert_close(f64(found["gap"]), f64(found["sampling"]) - f64(found["true"]), absolute=1e-12)
    assert (
        f64(found["gap"])[25:].abs().max() < 0.1
    )  # what 40 ancestral steps lose of the variance shows at the end
    assert found["gap"][-1] == 0.0  # both start at the same x_t


def test_a_network_that_predicts_too_much_noise_shows_in_the_gap():
    data = Gaussian(0.0, 1.0)
    optimal = data.denoiser("epsilon", COSINE)
    of = gaussian_subject(data, 500, kind="epsilon")
    wrong = subject(lambda x, t, cond: 1.1 * optimal(x, t, cond), data.batch(500).x0)

    gaps = [f64(ExposureBias(num=500, steps=20)(s)["eps_norm"]["gap"])[10] for s in (of, wrong)]

    assert abs(gaps[1]) > abs(gaps[0]) + 0.1


@pytest.mark.parametrize(
    ("num_labels", "over", "freedom"),
    [
        (1, "over all images", 399),
        (100, "within classes or captions", 300),
        (400, "most are alone", 399),
    ],
    ids=["one class", "four a class", "unique captions"],
)
def test_the_floor_is_unbiased_however_few_images_a_class_has(num_labels, over, freedom):
    """The labels say nothing here, so the perfect network is the same for all of them."""
    data = Gaussian(0.3, 0.5)
    of = gaussian_subject(
        data,
        400,
        labels=torch.arange(400) % num_labels,
        conditioning=ClassConditioning(num_labels, num_labels),
    )
    found = ExposureBias(num=400, steps=10)(of)

    def of_variance(variance):
        sigma = f64(found["sigma"])
        std = gaussian_std(of, f64([variance]), found["eps_norm"]["t"], "ancestral", True)
        return ((mean_of_std(400) * std - sigma) ** 2).mean()

    # The variance of 8 pixels is known to a relative sqrt(2 / (8 freedom)).
    low, high = (of_variance(0.25 * (1 + k * (2 / freedom / 8) ** 0.5)) for k in (-4, 4))
    assert low < found["floor"] < high
    assert (high - low) / high < 0.35  # four a class, by ddof 0, would lie below
    assert abs(found["value"] - of_variance(0.25)) < 4 * found["standard_error"]
    assert over in found["protocol"]["floor"]
    assert found["protocol"]["floor_degrees_of_freedom"] == freedom


@pytest.mark.parametrize("block_size", [1, 3, 7, 50])
def test_the_pooled_variance_is_that_of_its_definition(block_size):
    """Classes of 1, 2, 4 and 13 images, unsorted, which begin and end anywhere in blocks."""
    labels = torch.tensor([3, 1, 2, 3, 0, 3, 2, 1, 2, 3, 3, 2] + [3] * 8)
    x0 = Gaussian().batch(20).x0 + 3 * labels[:, None, None, None]
    of = subject(
        lambda x, t, cond: x,
        x0,
        labels=labels,
        conditioning=ClassConditioning(4, 4),
        block_size=block_size,
    )
    found = pooled_variance(of, of.held_out.by_label())
    squares = torch.zeros(8, dtype=torch.float64)
    for label in range(4):
        own = x0[labels == label].flatten(1)
        squares += ((own - own.mean(0)) ** 2).sum(0)

    assert_close(found.variance, squares / 16, relative=1e-12)
    assert (found.num_groups, found.degrees_of_freedom) == (4, 16)


def test_a_single_image_has_no_floor():
    found = ExposureBias(num=1, steps=3)(gaussian_subject(num=1))

    assert (found["floor"], found["standard_error"]) == (None, None)
    assert found["consecutive"]["floor"] == [None] * 3


def test_two_images_do_not_say_how_sure_a_std_is():
    """Both are as far from their mean, so neither moves the std: 0 would be no standard error."""
    found = ExposureBias(num=2, steps=3)(gaussian_subject(num=2))

    assert found["floor"] is not None
    assert found["standard_error"] is None
    assert found["consecutive"]["std_standard_error"] == [None] * 3
    assert ExposureBias(num=3, steps=3)(gaussian_subject(num=3))["standard_error"] > 0


@pytest.mark.parametrize("num", [2, 5, 400])
def test_the_population_std_of_few_samples_is_short_by_the_mean_of_chi(num):
    assert_close(mean_of_std(num), scipy.stats.chi(num - 1).mean() / num**0.5, relative=1e-9)


def test_the_standard_error_is_that_of_a_jackknife_over_images():
    of, diagnostic = gaussian_subject(num=80), ExposureBias(num=80, steps=6)
    found = diagnostic(of)
    indices = list(range(80))
    stages = list(diagnostic._process(of, of.held_out, indices, found["eps_norm"]["t"]))
    x0 = of.held_out.x0(indices)
    left = torch.stack([residual(of, stage, x0).flatten(1) for stage in reversed(stages)])

    def value(kept):
        p = left[:, kept].std(1, correction=0).mean(1)
        return float(((p - f64(found["sigma"])) ** 2).mean())

    assert_close(value(indices), found["value"], relative=1e-9)
    without = f64([value([j for j in indices if j != i]) for i in indices])
    jackknife = (79 / 80 * (without - without.mean()).square().sum()).sqrt()
    assert_close(found["standard_error"], jackknife, relative=0.05)  # they differ by O(1 / N)


class PerfectVariance:
    """The optimal x0_hat of Gaussian data, with the v that makes a step's variance the true one.

    Args:
        data: The data.
        timesteps: Those of the reverse process, ascending.
    """

    def __init__(self, data, timesteps):
        self.optimal, self.variance = data.denoiser("sample", COSINE), data.std**2
        self.below = dict(zip(timesteps[1:], timesteps[:-1], strict=True))

    def __call__(self, x, time, cond):
        x0, t = self.optimal(x, time, cond), int(time[0])
        if t not in self.below:
            return torch.cat([x0, torch.zeros_like(x0)], dim=1)
        level, before = (COSINE.level(torch.tensor([n])) for n in (t, self.below[t]))
        # x_t = r x_s + noise of variance b, so Var(x_s | x_t) = V_s b / V_t
        of_step = level.sigma**2 - (level.alpha / before.alpha * before.sigma) ** 2
        marginal = [n.alpha**2 * self.variance + n.sigma**2 for n in (before, level)]
        wanted = (marginal[0] * of_step / marginal[1]).log()
        smallest = (of_step * before.sigma**2 / level.sigma**2).log()
        v = 2 * (wanted - smallest) / (of_step.log() - smallest) - 1
        return torch.cat([x0, v.to(x0) * torch.ones_like(x0)], dim=1)


def learned_subject(data, num, timesteps):
    of = subject(PerfectVariance(data, timesteps), data.batch(num).x0, kind="sample")
    return dataclasses.replace(of, variance=LearnedRange())


def test_a_perfect_learned_variance_scores_the_floor_of_its_own():
    data = Gaussian(0.3, 0.7)
    timesteps = spread_timesteps(1000, 8)
    fixed = ExposureBias(num=1000, steps=8)(gaussian_subject(data, 1000))
    found = ExposureBias(num=1000, steps=8)(learned_subject(data, 1000, timesteps))
    tolerance = 4 * found["standard_error"]

    assert abs(found["value"] - found["floor"]) < tolerance
    assert abs(found["floor"] - fixed["floor"]) > 2 * tolerance
