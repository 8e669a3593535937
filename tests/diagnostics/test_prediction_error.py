"""The spread of the prediction error against closed forms, and the test of normality."""

import math

import pytest
import scipy.stats
import torch
from helpers.subjects import f64, gaussian_subject, gaussian_x0, subject
from helpers.support import Gaussian, assert_close

from difftrain.core.errors import InputError
from difftrain.diagnostics.prediction_error import (
    PredictionError,
    influence_on_nu,
    rejection,
    shapiro_wilk,
)

# (W, p) by scipy 1.17.1, scipy.stats.shapiro, of the columns below, to nine digits.
GOLDEN = {
    20: [
        (0.991284052, 0.999266005),
        (0.960375183, 0.551371746),
        (0.856357457, 0.00682480925),
        (0.776736740, 0.000396594026),
    ],
    100: [
        (0.997511029, 0.999776079),
        (0.954724745, 0.00172172219),
        (0.829103921, 2.15604037e-09),
        (0.860185228, 2.87438765e-08),
    ],
    400: [
        (0.999410307, 0.999992408),
        (0.954690782, 9.57758621e-10),
        (0.820458154, 8.38799531e-21),
        (0.956246698, 1.59346989e-09),
    ],
}


def columns(n):
    """Four columns [n, 4] without a generator: nearly normal, uniform, skewed, two outliers."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    wavy = torch.erfinv(2 * u - 1) + 0.1 * torch.sin(7 * torch.arange(n))
    outliers = torch.erfinv(2 * u - 1)
    outliers[0], outliers[-1] = -4.0, 5.0
    return torch.stack([wavy, u, -(1 - u).log(), outliers], dim=1)


@pytest.mark.parametrize("n", GOLDEN)
def test_shapiro_wilk_gives_scipys_stored_numbers(n):
    w, p = shapiro_wilk(columns(n).flip(0))
    expected = f64(GOLDEN[n])

    assert_close(w, expected[:, 0], relative=3e-9)  # nine digits
    assert_close(p, expected[:, 1], relative=3e-9)


def test_each_column_is_tested_alone():
    x = (
        torch.randn(100, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
        + 5
    )
    x[:, 10:] = torch.randn(
        100, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    w, p = shapiro_wilk(x)

    assert_close(w, [scipy.stats.shapiro(column).statistic for column in x.T.numpy()])
    assert_close(p, [scipy.stats.shapiro(column).pvalue for column in x.T.numpy()])


@pytest.mark.filterwarnings("error")
def test_a_column_without_spread_cannot_be_tested():
    normal = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    w, p = shapiro_wilk(torch.cat([torch.full((100, 1), 0.1), normal], dim=1))

    assert p.isnan().tolist() == w.isnan().tolist() == [True, False]
    assert shapiro_wilk(torch.zeros(100, 3))[1].isnan().all()


def test_errors_of_the_optimal_denoiser_of_gaussian_data_are_normal_and_as_wide_as_known():
    data = Gaussian()
    of = gaussian_subject(data, 600, kind="sample")
    of = subject(of.denoiser, gaussian_x0(data, 600), kind="sample", training=of.held_out)
    found = PredictionError(num=600, num_timesteps=25)(of)
    level = of.schedule.level(torch.tensor(found["t"]))
    tolerance = 5 / (2 * 600 * 8) ** 0.5  # relative standard error of a standard deviation

    assert found["t"] == list(range(0, 1000, 40))
    assert_close(f64(found["nu"]), data.optimal_error("sample", level).sqrt(), relative=tolerance)
    assert abs(found["mean_rejected"] - 0.05) < 4 * math.sqrt(0.05 * 0.95 / (8 * 25))
    assert found["tested"] == [1.0] * 25


def test_each_pixel_is_tested_on_100_different_images():
    """Of just 100 images all are drawn; of uniform errors a test of fewer rejects fewer."""
    errors = torch.rand(100, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share, _ = rejection(errors, torch.Generator().manual_seed(1))

    assert_close(share, (shapiro_wilk(errors)[1] < 0.05).double().mean(), absolute=1e-12)
    assert 0 < share < 1


def test_nu_is_the_mean_of_the_pixels_population_deviations_after_clipping():
    """A network that always answers 3, clipped to 1: the error is 1 - x0. One pixel is constant."""
    x0 = torch.zeros(120, 1, 1, 3, dtype=torch.float64)
    x0[:60, ..., 0], x0[:30, ..., 1] = 0.5, -1.0
    of = subject(lambda x, t, cond: torch.full_like(x, 3.0), x0, kind="sample", clips=True)
    found = PredictionError(num_timesteps=2, images="held_out")(of)

    assert_close(found["value"], (0.25 + math.sqrt(0.25 * 0.75) + 0) / 3, relative=1e-12)
    assert found["rejected"] == [1.0, 1.0]  # two values are far from normal
    assert_close(f64(found["tested"]), [2 / 3, 2 / 3], relative=1e-12)
    assert found["protocol"]["clipped"] is True


@pytest.mark.parametrize(
    ("diagnostic", "message"),
    [
        (
            PredictionError(),
            "training images, but the training data is a stream. Write images: held_out",
        ),
        (PredictionError(num=99, images="held_out"), "100 images are tested at each pixel, got 99"),
    ],
)
def test_what_cannot_be_measured_is_refused(diagnostic, message):
    with pytest.raises(InputError, match=message):
        diagnostic(gaussian_subject(num=150, why_no_training="the training data is a stream"))


def test_the_standard_error_is_that_of_a_jackknife_over_images():
    of, part = gaussian_subject(num=120), PredictionError(120, 3, "held_out")
    found = part(of)
    errors = torch.stack([part._errors(of, of.held_out, t) for t in found["t"]])

    def jackknifed(value):
        without = f64([value([j for j in range(120) if j != i]) for i in range(120)])
        return (119 / 120 * (without - without.mean()).square().sum()).sqrt()

    def nu(kept, of_t):
        return float(errors[of_t][..., kept, :].std(-2, correction=0).mean())

    both = slice(0, 3)
    # They differ by O(1 / N).
    expected = jackknifed(lambda kept: nu(kept, both))
    assert_close(found["standard_error"], expected, relative=0.05)
    expected = jackknifed(lambda kept: nu(kept, 1))
    assert_close(found["nu_standard_error"][1], expected, relative=0.05)


def test_pixels_without_spread_have_no_influence():
    errors = torch.zeros(10, 2, dtype=torch.float64)
    errors[:, 0] = torch.arange(10)

    assert_close(influence_on_nu(errors), influence_on_nu(errors[:, :1]) / 2, absolute=1e-12)
