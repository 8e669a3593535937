"""How output, x0 and eps imply each other, at arbitrary levels: not only variance preserving."""

import pytest
import torch
from helpers.support import PARAMETERIZATIONS, assert_close, images, mixture
from hypothesis import given
from hypothesis import strategies as st

from difftrain.objective.parameterization import (
    check_same_shape,
    estimate,
    squared_error_scale,
    target,
)
from difftrain.objective.schedule import NoiseLevel, diffuse, expand_like

amounts = st.lists(st.floats(0.05, 3.0), min_size=3, max_size=3).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
levels = st.builds(NoiseLevel, amounts, amounts)
kinds = pytest.mark.parametrize("kind", PARAMETERIZATIONS)
X0 = images(3)
EPS = images(3, seed=1)
OTHER = images(3, seed=2)


@kinds
@given(level=levels)
def test_estimate_of_the_target_is_the_clean_image_and_its_noise(kind, level):
    found = estimate(kind, target(kind, X0, EPS, level), diffuse(X0, EPS, level), level)

    # alpha, sigma >= 0.05: rounding grows at most 60-fold.
    assert_close(found.x0, X0, absolute=1e-12)
    assert_close(found.eps, EPS, absolute=1e-12)


@kinds
@given(level=levels)
def test_estimate_of_any_output_explains_the_input(kind, level):
    x_t = diffuse(X0, EPS, level)
    found = estimate(kind, OTHER, x_t, level)

    assert_close(diffuse(found.x0, found.eps, level), x_t, absolute=1e-12)


@kinds
@given(level=levels)
def test_target_is_the_stated_mixture_of_image_and_noise(kind, level):
    p, q = mixture(kind, level)
    assert_close(
        target(kind, X0, EPS, level),
        expand_like(p, X0) * X0 + expand_like(q, X0) * EPS,
        absolute=1e-15,
    )


@kinds
@given(level=levels)
def test_squared_error_scale_is_the_ratio_of_the_two_errors(kind, level):
    x_t = diffuse(X0, EPS, level)
    output_error = (OTHER - target(kind, X0, EPS, level)).flatten(1).square().sum(1)
    x0_error = (estimate(kind, OTHER, x_t, level).x0 - X0).flatten(1).square().sum(1)

    assert_close(output_error, squared_error_scale(kind, level) * x0_error, relative=1e-10)
    assert squared_error_scale(kind, level).dtype == torch.float64


def test_v_of_a_variance_preserving_level_is_the_rotation():
    angle = torch.tensor([0.3, 0.8, 1.2], dtype=torch.float64)
    level = NoiseLevel(angle.cos(), angle.sin())
    x_t = diffuse(X0, EPS, level)
    found = estimate("v_prediction", OTHER, x_t, level)

    cos, sin = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    assert_close(found.x0, cos * x_t - sin * OTHER, absolute=1e-15)
    assert_close(found.eps, sin * x_t + cos * OTHER, absolute=1e-15)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_v_and_flow_estimates_are_finite_at_both_ends(kind):
    level = NoiseLevel(
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),
    )
    found = estimate(kind, OTHER, X0, level)

    assert bool(found.x0.isfinite().all())
    assert bool(found.eps.isfinite().all())


def test_estimate_keeps_the_dtype_and_the_video_shape_of_the_input():
    video = torch.zeros(2, 3, 4, 5, 5, dtype=torch.float32)
    level = NoiseLevel(torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6]).double())

    found = estimate("v_prediction", video, video, level)

    assert found.x0.shape == found.eps.shape == video.shape
    assert found.x0.dtype == found.eps.dtype == torch.float32


@pytest.mark.parametrize(
    "function",
    [
        lambda kind, level: estimate(kind, X0, X0, level),
        lambda kind, level: target(kind, X0, X0, level),
        lambda kind, level: squared_error_scale(kind, level),
    ],
)
def test_unknown_parameterization_names_the_known_ones(function):
    level = NoiseLevel(torch.ones(3).double(), torch.ones(3).double())
    with pytest.raises(
        ValueError,
        match=r"^unknown parameterization 'noise'; "
        r"known: epsilon, sample, v_prediction, flow_prediction$",
    ):
        function("noise", level)


def test_shapes_that_only_broadcast_are_rejected():
    message = r"^expected equal shapes, got \[3, 2, 3, 3\] and \[3, 1, 3, 3\]$"
    with pytest.raises(ValueError, match=message):
        check_same_shape(X0, X0[:, :1])
    level = NoiseLevel(torch.ones(3).double(), torch.ones(3).double())
    with pytest.raises(ValueError, match=message):
        target("v_prediction", X0, X0[:, :1], level)
    with pytest.raises(ValueError, match=message):
        estimate("v_prediction", X0, X0[:, :1], level)


def test_a_level_of_the_wrong_batch_size_is_rejected():
    with pytest.raises(
        ValueError, match=r"^expected one value per sample, shape \[3\], got \[1\]$"
    ):
        expand_like(torch.ones(1), X0)
