"""Denoising errors against the known least errors of Gaussian data, and of sets that differ."""

import dataclasses
import json

import pytest
import scipy.stats
import torch
from helpers.subjects import COSINE, clean, f64, gaussian_subject, gaussian_x0, subject, true_x0
from helpers.support import Gaussian, assert_close

from difftrain.core.errors import InputError
from difftrain.diagnostics.base import Clean
from difftrain.diagnostics.denoising_error import DenoisingError, error_bands
from difftrain.diagnostics.spacing import spread_timesteps, trailing_timesteps
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.variance import LearnedRange

NUM, VALUES = 500, 500 * 8  # images, and numbers in them


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("epsilon", NoiseSchedule.linear()),
        ("v_prediction", COSINE),
        ("sample", COSINE),
        ("flow_prediction", NoiseSchedule.flow()),
    ],
    ids=["epsilon", "v", "x0", "flow"],
)
def test_errors_of_the_optimal_denoiser_are_the_least_ones(kind, schedule):
    data = Gaussian()
    found = DenoisingError(num=NUM, num_timesteps=7)(gaussian_subject(data, NUM, schedule, kind))
    level = schedule.level(torch.tensor(found["t"]))
    tolerance = (
        5 * (2 / VALUES) ** 0.5
    )  # a mean of squared normal numbers has the relative standard error sqrt(2 / n)
    inner = (
        slice(0, 6) if kind == "flow_prediction" else slice(0, 7)
    )  # at SNR = 0 eps is 0 / 0 for none, but its least error is 0

    assert_close(
        f64(found["held_out"]["loss"]), data.optimal_error(kind, level), relative=tolerance
    )
    assert_close(
        f64(found["held_out"]["x0_error"]), data.optimal_error("sample", level), relative=tolerance
    )
    assert_close(
        f64(found["held_out"]["eps_error"][inner]),
        data.optimal_error("epsilon", level)[inner],
        relative=tolerance,
    )
    assert_close(found["value"], data.optimal_error(kind, level).mean(), relative=tolerance)


def test_the_gap_is_that_of_a_network_that_knows_its_training_images():
    image = gaussian_x0(Gaussian(), 1)[0]
    held_out = gaussian_x0(Gaussian(), 40, seed=1)
    training = Clean(40, lambda indices: image.expand(len(indices), *image.shape))
    found = DenoisingError(num=40, num_timesteps=5)(
        subject(true_x0(image, COSINE, "sample"), held_out, kind="sample", training=training)
    )
    away = (held_out - image).square().mean()

    assert_close(f64(found["training"]["x0_error"]), torch.zeros(5))
    assert_close(f64(found["gap"]["loss"]), away.expand(5), relative=1e-6)
    error = (held_out - image).square().flatten(1).mean(1).std() / 40**0.5
    assert_close(f64(found["gap_standard_error"]["loss"]), error.expand(5), relative=1e-6)


def test_the_gap_of_a_single_image_has_no_standard_error():
    held_out = gaussian_x0(Gaussian(), 1)
    training = Clean(40, lambda indices: gaussian_x0(Gaussian(), 40)[indices])
    found = DenoisingError(num=40, num_timesteps=5)(
        subject(true_x0(held_out[0], COSINE, "sample"), held_out, kind="sample", training=training)
    )

    assert found["gap"]["loss"][0] is not None
    assert found["gap_standard_error"]["loss"] == [None] * 5


def test_the_gap_of_sets_from_one_distribution_is_within_its_standard_errors():
    data = Gaussian()
    training = Clean(300, lambda indices: gaussian_x0(data, 300, seed=9)[list(indices)])
    found = DenoisingError(num=300, num_timesteps=10)(
        gaussian_subject(data, 300, training=training)
    )
    away = f64(found["gap"]["x0_error"]) / f64(found["gap_standard_error"]["x0_error"])

    assert away.abs().max() < 4
    assert away.abs().max() > 0.1


def test_a_network_with_variance_channels_has_the_errors_of_its_prediction():
    of = gaussian_subject(num=20)

    def with_variance(x, t, cond):
        return torch.cat([of.denoiser(x, t, cond), 7 + 0 * x], dim=1)

    found = DenoisingError(num_timesteps=3)(
        dataclasses.replace(of, denoiser=with_variance, variance=LearnedRange())
    )

    assert found["held_out"] == DenoisingError(num_timesteps=3)(of)["held_out"]


def test_images_without_labels_are_refused_for_a_network_that_takes_them():
    with pytest.raises(InputError, match="the held-out images have none"):
        gaussian_subject(num=3, conditioning=ClassConditioning(2, 2))


def test_bands_hold_the_timesteps_of_their_log_snr_and_leave_out_snr_0():
    errors = torch.arange(15, dtype=torch.float64).reshape(5, 3)
    found = error_bands(f64([3.9, 2.0, 0.1, -0.1, -torch.inf]), errors)

    assert [(band["log_snr"], band["timesteps"], band["loss"]) for band in found] == [
        ([-2.0, 0.0], 1, 9.0),
        ([0.0, 2.0], 1, 6.0),
        ([2.0, 4.0], 2, 1.5),
    ]


def test_the_same_numbers_come_again_in_blocks_of_another_size():
    one, other = (
        DenoisingError(num=50, num_timesteps=4)(gaussian_subject(num=90, block_size=size))
        for size in (7, 50)
    )

    assert_close(f64(one["held_out"]["loss"]), f64(other["held_out"]["loss"]), relative=1e-12)
    assert one["protocol"]["num_images"] == 50
    json.dumps(one, allow_nan=False)


def test_images_are_taken_evenly_from_a_set_that_is_sorted():
    spread = Clean(10, lambda indices: torch.tensor(list(indices)), torch.arange(10) // 5).spread(4)

    assert spread.x0([0, 1, 2, 3]).tolist() == [0, 2, 5, 7]
    assert spread.labels_of([1, 2]).tolist() == [0, 1]


def test_spacings_are_those_of_adm_and_of_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(7)

    assert trailing_timesteps(1000, 7) == scheduler.timesteps.tolist()[::-1]
    assert spread_timesteps(1000, 20)[:3] == [0, 53, 105]
    assert spread_timesteps(1000, 20)[-1] == 999
    assert spread_timesteps(1000, 1) == [999]
    with pytest.raises(InputError, match="11 steps, but the schedule has 10 timesteps"):
        trailing_timesteps(10, 11)


def test_standard_errors_are_those_of_means_over_images():
    of = gaussian_subject(num=30, training=clean(Gaussian().batch(20, 7).x0))
    part = DenoisingError(num=30, num_timesteps=4)
    found = part(of)
    errors = part._errors(of, of.held_out, found["t"]).numpy()

    def sem(values):
        return f64(scipy.stats.sem(values).tolist())

    assert_close(found["standard_error"], sem(errors[..., 0].mean(1)), relative=1e-9)
    for name, k in (("loss", 0), ("x0_error", 1), ("eps_error", 2)):
        assert_close(
            f64(found["held_out_standard_error"][name]), sem(errors[..., k]), relative=1e-9
        )
    of_both = [f64(found[f"{name}_standard_error"]["loss"]) for name in ("held_out", "training")]
    squares = of_both[0] ** 2 + of_both[1] ** 2
    assert_close(f64(found["gap_standard_error"]["loss"]) ** 2, squares, relative=1e-9)


def test_one_image_has_no_standard_error():
    found = DenoisingError(num=1, num_timesteps=2)(gaussian_subject(num=1))

    assert found["standard_error"] is None
    assert found["held_out_standard_error"]["loss"] == [None, None]
