"""DDIM inversion against diffusers' inverse scheduler, and its error where it is known."""

import math

import pytest
import torch
from helpers.subjects import COSINE, clean, f64, gaussian_subject, subject
from helpers.support import Gaussian, assert_close
from helpers.tiny_networks import vae

from difftrain.data.items import Images
from difftrain.data.transform import to_unit_range
from difftrain.diagnostics.base import Clean
from difftrain.diagnostics.inversion import Inversion, inverted, similarity
from difftrain.diagnostics.spacing import trailing_timesteps
from difftrain.models.autoencoder import LatentEncoder
from difftrain.objective.schedule import NoiseSchedule, expand_like


def network(x, time, cond):
    return torch.tanh(x.flip(-1)) * expand_like(1 + time.to(x) / 1000, x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_way_up_is_diffusers_inverse_scheduler(kind):
    from diffusers import DDIMInverseScheduler

    schedule, x = NoiseSchedule.linear(), Gaussian().batch(3).x0
    scheduler = DDIMInverseScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=kind,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, t.expand(3), {}), t, expected).prev_sample

    found = inverted(subject(network, x, schedule, kind), x, trailing_timesteps(1000, 10), None)

    assert_close(found, expected, absolute=1e-4)  # its tables are float32


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
def test_the_error_of_a_linear_field_vanishes_as_the_steps_grow(kind, schedule):
    data = Gaussian(0.1, 0.2)
    few, many = (
        Inversion(num=50, steps=steps)(gaussian_subject(data, 50, schedule, kind))
        for steps in (20, 320)
    )

    assert many["mse"] < few["mse"] / (
        1.5 if kind == "sample" else 20
    )  # that of x0 is 5e-6 after 20 steps
    assert many["mse"] < 1e-4
    assert_close(many["noise_mean"], 0.0, absolute=5 / 400**0.5)
    assert_close(many["noise_std"], 1.0, absolute=0.15)


def test_mse_psnr_and_ssim_of_known_images():
    a = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.stack([a[0], (a[1] - 0.1)])
    found = similarity(b, a)

    assert_close(found[:, 0], [0.0, 0.01], absolute=1e-15)
    assert_close(found[1, 1], 20.0, relative=1e-9)
    assert found[0, 1] == 120  # an error of 0 is 120 dB, not infinite
    assert_close(found[0, 2], 1.0, absolute=1e-9)
    assert 0.9 < found[1, 2] < 1


def test_ssim_is_that_of_its_definition_on_constant_images():
    """Without variance SSIM is (2 m n + c) / (m^2 + n^2 + c), c = 0.01^2."""
    found = similarity(torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.5))

    assert_close(found[0, 2], (2 * 0.1 + 1e-4) / (0.04 + 0.25 + 1e-4), absolute=1e-4)


def test_small_images_have_no_ssim_and_the_psnr_is_a_mean_over_images():
    def zero(x, time, cond):
        return torch.zeros_like(x)

    x0 = f64([[0.2] * 4, [0.6] * 4]).reshape(2, 1, 2, 2)
    found = Inversion(num=2, steps=3)(subject(zero, x0, kind="sample"))
    errors = [(0.2 / 2) ** 2, (0.6 / 2) ** 2]  # x0_hat = 0 on the way down

    assert found["ssim"] is None
    assert_close(found["mse"], sum(errors) / 2, relative=1e-6)
    assert_close(found["psnr"], sum(-10 * math.log10(e) for e in errors) / 2, relative=1e-6)


def test_of_latents_the_encoders_round_trip_is_reported_as_the_ceiling(tmp_path):
    encoder = LatentEncoder(str(vae(tmp_path / "vae")), sample=False)
    pixels = torch.randint(
        0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    data = Clean.of_images(Images(pixels, None), encoder, torch.device("cpu"))
    of = gaussian_subject(Gaussian(0.0, 1.0), num=3, kind="v_prediction", encoder=encoder)
    of = subject(
        of.denoiser, torch.zeros(1, 4, 8, 8), kind="v_prediction", encoder=encoder, held_out=data
    )
    found = Inversion(num=3, steps=100)(of)
    image = to_unit_range(pixels)
    ceiling = (
        ((encoder.decode(encoder.encode(image, None)).clamp(-1, 1) - image) / 2).square().mean()
    )

    assert_close(found["encoder"]["mse"], ceiling, relative=1e-5)
    assert found["encoder"]["ssim"] is not None
    assert found["mse"] == pytest.approx(found["encoder"]["mse"], rel=0.2)


def test_nothing_is_clipped_on_the_way():
    """Data that goes far beyond [-1, 1]: the sampler's clipping would change the way back."""
    found = [
        Inversion(num=20, steps=10)(gaussian_subject(Gaussian(0.0, 1.0), 20, clips=clips))
        for clips in (True, False)
    ]

    assert found[0]["mse"] == found[1]["mse"]


def test_pixels_have_no_ceiling():
    assert "encoder" not in Inversion(num=2, steps=2)(gaussian_subject(num=2))
    assert clean(torch.zeros(2, 1)).pixels is None


def test_standard_errors_are_those_of_means_over_images():
    of, part = gaussian_subject(num=12), Inversion(num=12, steps=4)
    found = part(of)
    timesteps = trailing_timesteps(1000, 4)
    rows = part._rows(of, of.held_out, list(range(12)), timesteps)
    expected = rows[:, :2].std(0) / math.sqrt(12)

    assert_close(found["standard_error"], expected[0], relative=1e-9)
    assert_close(found["psnr_standard_error"], expected[1], relative=1e-9)
