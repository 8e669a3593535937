"""The noise that is the target, and the perturbation that only the input sees."""

import pytest
import torch
from support import assert_close

from difftrain.noise import InputPerturbation, Offset, White
from difftrain.rng import Rng
from difftrain.schedule import NoiseSchedule

X0 = torch.zeros(4000, 2, 3, 3, dtype=torch.float64)
MANY = Rng(0, 0, range(4000))
SAMPLES = 4 / 4000**0.5  # 4 standard errors of a mean of 4000 numbers of variance 1


def covariance(eps):
    """Of the 18 places of an image, over 4000 images."""
    return torch.cov(eps.flatten(1).T, correction=1)


def test_white_noise_has_unit_covariance():
    eps = White()(X0, MANY)

    assert_close(eps.mean(0), torch.zeros(2, 3, 3), absolute=SAMPLES * 1.3)  # 18 places
    assert_close(covariance(eps), torch.eye(18), absolute=SAMPLES * 2**0.5 * 1.3)


def test_white_noise_is_the_stream_called_noise():
    assert torch.equal(White()(X0[:3], Rng(1, 2, [0, 1, 5])), Rng(1, 2, [0, 1, 5]).normal((2, 3, 3), "noise").double())


@pytest.mark.parametrize("strength", [0.1, 0.7])
def test_offset_noise_adds_one_number_to_each_channel_of_an_image(strength):
    eps, white = Offset(strength)(X0, MANY), White()(X0, MANY)
    offset = eps - white

    assert_close(offset, offset[..., :1, :1].expand_as(offset), absolute=1e-6)  # added in float32
    assert_close(torch.cov(offset[..., 0, 0].T), strength**2 * torch.eye(2), absolute=strength**2 * SAMPLES * 2**0.5)
    assert abs((offset[..., 0, 0] * white[..., 0, 0]).mean()) < strength * SAMPLES


def test_offset_noise_of_a_video_is_one_number_for_all_frames():
    video = torch.zeros(2, 3, 4, 5, 5)
    offset = Offset(1.0)(video, Rng(0, 0, [0, 1])) - White()(video, Rng(0, 0, [0, 1]))

    assert_close(offset, offset[..., :1, :1, :1].expand_as(offset), absolute=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_perturbed_noise_is_wider_by_gamma_squared_and_keeps_its_correlation_with_eps(gamma):
    eps = White()(X0, MANY)
    eps_in = InputPerturbation(gamma)(eps, NoiseSchedule.linear(10).level(torch.zeros(4000).long()), MANY)
    num = eps.numel()

    assert_close((eps_in**2).mean(), 1 + gamma**2, absolute=4 * (1 + gamma**2) * (2 / num) ** 0.5)
    assert_close(((eps_in - eps) * eps).mean(), 0.0, absolute=4 * gamma / num**0.5)


def test_perturbation_does_not_touch_the_noise_it_is_given():
    eps = White()(X0[:4], Rng(0, 0, range(4)))
    kept = eps.clone()

    InputPerturbation(0.5)(eps, NoiseSchedule.linear(10).level(torch.zeros(4).long()), Rng(0, 0, range(4)))

    assert torch.equal(eps, kept)


def test_perturbation_is_not_the_noise_once_more():
    eps = White()(X0, MANY)
    xi = InputPerturbation(1.0)(eps, NoiseSchedule.linear(10).level(torch.zeros(4000).long()), MANY) - eps

    assert abs((xi * eps).mean()) < 4 / eps.numel() ** 0.5


def test_perturbation_by_default_keeps_the_clean_target_and_the_published_gamma():
    assert InputPerturbation() == InputPerturbation(gamma=0.1, target="clean")


def test_noise_is_the_same_numbers_in_any_precision():
    wide, half = White()(X0[:2], Rng(0, 0, [0, 1])), White()(X0[:2].half(), Rng(0, 0, [0, 1]))

    assert torch.equal(wide.half(), half)
