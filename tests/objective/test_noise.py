"""The noise that is the target, and the perturbation that only the input gets."""

import pytest
import torch
from helpers.support import PARAMETERIZATIONS, assert_close, images

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.noise import InputPerturbation, Mixed, Offset, White
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import NOISES, PERTURBATIONS
from difftrain.objective.types import Batch

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
    assert torch.equal(
        White()(X0[:3], Rng(1, 2, [0, 1, 5])),
        Rng(1, 2, [0, 1, 5]).normal((2, 3, 3), "noise").double(),
    )


@pytest.mark.parametrize("strength", [0.1, 0.7])
def test_offset_noise_adds_one_number_to_each_channel_of_an_image(strength):
    eps, white = Offset(strength)(X0, MANY), White()(X0, MANY)
    offset = eps - white

    assert_close(offset, offset[..., :1, :1].expand_as(offset), absolute=1e-6)  # added in float32
    assert_close(
        torch.cov(offset[..., 0, 0].T),
        strength**2 * torch.eye(2),
        absolute=strength**2 * SAMPLES * 2**0.5,
    )
    assert abs((offset[..., 0, 0] * white[..., 0, 0]).mean()) < strength * SAMPLES


def test_offset_noise_of_a_video_is_one_number_for_all_frames():
    video = torch.zeros(2, 3, 4, 5, 5)
    offset = Offset(1.0)(video, Rng(0, 0, [0, 1])) - White()(video, Rng(0, 0, [0, 1]))

    assert_close(offset, offset[..., :1, :1, :1].expand_as(offset), absolute=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_mixed_noise_has_variance_one_and_the_published_correlation_of_frames_and_of_nothing_else(
    ratio,
):
    clips = torch.zeros(4000, 2, 3, 2, 1, dtype=torch.float64)  # C, F, H, W
    between_frames = ratio**2 / (1 + ratio**2)
    frames = torch.full((3, 3), between_frames).fill_diagonal_(1.0).double()
    # Channels and places are independent.
    expected = torch.kron(torch.eye(2), torch.kron(frames, torch.eye(2)))

    eps = Mixed(ratio)(clips, MANY)

    assert_close(eps.mean(0), torch.zeros(2, 3, 2, 1), absolute=SAMPLES * 1.3)
    assert_close(covariance(eps), expected, absolute=SAMPLES * 2**0.5 * 1.3)


def test_mixed_noise_is_whites_own_part_and_one_image_for_all_frames_of_a_clip():
    video, few = torch.zeros(3, 2, 4, 5, 5, dtype=torch.float64), Rng(0, 0, range(3))
    shared = (Mixed(2.0)(video, few) * 5**0.5 - White()(video, few)) / 2

    assert_close(shared, shared[:, :, :1].expand_as(shared), absolute=1e-6)  # mixed in float32
    assert shared[:, :, 0].flatten(1).std(1).min() > 0.5
    # Another one for each clip.
    assert torch.corrcoef(shared[:, :, 0].flatten(1)).fill_diagonal_(0).abs().max() < 4 / 50**0.5


def test_mixed_noise_of_ratio_zero_is_white_noise_bit_for_bit():
    video, few = torch.zeros(3, 2, 4, 5, 5), Rng(5, 3, range(3))

    assert torch.equal(Mixed(0.0)(video, few), White()(video, few))


def test_mixed_noise_of_images_is_rejected_with_a_remedy():
    with pytest.raises(InputError) as error:
        NOISES.parse({"type": "mixed", "ratio": 0.5}, "noise").build()(X0[:2], Rng(0, 0, range(2)))
    assert str(error.value) == (
        "noise Mixed is shared over the frames of a clip, x0 [B, C, F, H, W], but the data has the "
        "shape [2, 2, 3, 3]. Train on video, or write noise: {type: white}."
    )


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_perturbed_noise_is_wider_by_gamma_squared_and_keeps_its_correlation_with_eps(gamma):
    eps = White()(X0, MANY)
    eps_in = InputPerturbation(gamma)(
        eps, NoiseSchedule.linear(10).level(torch.zeros(4000).long()), MANY
    )
    num = eps.numel()

    assert_close((eps_in**2).mean(), 1 + gamma**2, absolute=4 * (1 + gamma**2) * (2 / num) ** 0.5)
    assert_close(((eps_in - eps) * eps).mean(), 0.0, absolute=4 * gamma / num**0.5)


def test_perturbation_does_not_touch_the_noise_it_is_given():
    eps = White()(X0[:4], Rng(0, 0, range(4)))
    kept = eps.clone()

    InputPerturbation(0.5)(
        eps, NoiseSchedule.linear(10).level(torch.zeros(4).long()), Rng(0, 0, range(4))
    )

    assert torch.equal(eps, kept)


def test_perturbation_is_not_the_noise_once_more():
    eps = White()(X0, MANY)
    xi = (
        InputPerturbation(1.0)(eps, NoiseSchedule.linear(10).level(torch.zeros(4000).long()), MANY)
        - eps
    )

    assert abs((xi * eps).mean()) < 4 / eps.numel() ** 0.5


def test_perturbation_by_default_keeps_the_clean_target_and_the_published_gamma():
    assert InputPerturbation() == InputPerturbation(gamma=0.1, target="clean")


ANY_LEVEL = NoiseSchedule.linear(10).level(torch.zeros(4000).long())


def xi_of(perturbation, rng=MANY):
    """xi as the input sees it, strength included."""
    return perturbation(torch.zeros_like(X0), ANY_LEVEL, rng)


def test_perturbation_is_gaussian_and_independent_in_every_place():
    xi = xi_of(InputPerturbation(1.0))

    # 1.8 if it were uniform.
    assert_close((xi**4).mean(), 3.0, absolute=4 * (96 / xi.numel()) ** 0.5)
    assert_close(xi.mean(), 0.0, absolute=4 / xi.numel() ** 0.5)
    assert_close(covariance(xi), torch.eye(18), absolute=SAMPLES * 2**0.5 * 1.3)


def test_perturbation_has_the_same_strength_at_every_step_and_for_every_sample():
    for step in range(
        12
    ):  # a strength drawn anew for each batch from (0, gamma) would be 0.03 at its mean
        of_sample = (
            xi_of(InputPerturbation(0.3), Rng(0, step, range(4000))).square().flatten(1).mean(1)
        )
        assert_close(of_sample.mean(), 0.09, absolute=4 * 0.09 * (2 / 18 / 4000) ** 0.5)
        # That of a mean of 18 squares: nothing is drawn by sample.
        assert_close(of_sample.var(), 0.09**2 * 2 / 18, relative=0.25)


@pytest.mark.parametrize(
    ("step", "left"), [(0, 1.0), (1, 0.9), (5, 0.5), (9, 0.1), (10, 0.0), (11, 0.0), (10**6, 0.0)]
)
def test_gamma_falls_linearly_to_zero_over_the_first_steps_with_the_same_draws(step, left):
    rng = Rng(3, step, range(4))
    eps = White()(X0[:4], rng)

    eps_in = InputPerturbation(0.4, decay_steps=10)(eps, ANY_LEVEL[:4], rng)

    assert_close(
        eps_in, eps + 0.4 * left * rng.normal((2, 3, 3), "perturbation").double(), absolute=1e-15
    )


def test_gamma_is_constant_by_default():
    for step in (0, 7, 10**6):
        rng = Rng(0, step, range(4))
        assert torch.equal(
            InputPerturbation(0.4)(X0[:4], ANY_LEVEL[:4], rng),
            0.4 * rng.normal((2, 3, 3), "perturbation").double(),
        )


class Undrawable(Rng):
    """Fails when a perturbation draws from it."""

    def normal(self, shape, stream):
        assert stream != "perturbation"
        return super().normal(shape, stream)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("step", [5, 6, 500])
def test_a_perturbation_that_has_decayed_draws_nothing_and_is_the_plain_objective_bit_for_bit(
    kind, step
):
    losses = [
        Objective(NoiseSchedule.linear(), kind, perturbation=perturbation)(
            lambda x, t, cond: 0.3 * x, Batch(images(4)), rng
        )
        for perturbation, rng in [
            (None, Rng(0, step, range(4))),
            (InputPerturbation(0.4, decay_steps=5), Undrawable(0, step, range(4))),
        ]
    ]
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(losses[0].errors, losses[1].errors)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "all"])
def test_decay_steps_are_a_positive_number_of_steps(wrong):
    with pytest.raises(
        InputError, match=r"^perturbation\.decay_steps: expected .*, got " + repr(wrong)
    ):
        PERTURBATIONS.parse({"type": "input_perturbation", "decay_steps": wrong}, "perturbation")


def test_noise_is_the_same_numbers_in_any_precision():
    wide, half = White()(X0[:2], Rng(0, 0, [0, 1])), White()(X0[:2].half(), Rng(0, 0, [0, 1]))

    assert torch.equal(wide.half(), half)
