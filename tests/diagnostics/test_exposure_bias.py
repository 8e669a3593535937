"""Exposure bias of perfect and of wrong networks against closed forms and stored numbers."""

import math

import pytest
import torch
from helpers.subjects import COSINE, f64, gaussian_subject, subject, true_x0
from helpers.support import Gaussian, assert_close

from difftrain.diagnostics.exposure_bias import ExposureBias
from difftrain.diagnostics.gathering import population_std, power_sums
from difftrain.diagnostics.gaussian_floor import gaussian_std
from difftrain.diagnostics.spacing import spread_timesteps
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule

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
    assert_close(f64(found["consecutive"]["floor"]), torch.zeros(10), absolute=1e-15)
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

    assert_close(f64(found["consecutive"]["floor"]), torch.zeros(5), absolute=1e-15)
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
