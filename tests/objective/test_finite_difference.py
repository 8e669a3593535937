"""Finite differences against derivatives in closed form, and the calibrated step against a scan."""

import math

import pytest
import torch
from helpers.support import assert_close, images

from difftrain.objective.finite_difference import COARSEST, calibrate, change_along

X = images(3)
DIRECTION = images(3, seed=1)


def slope_of(function, h, value=None):
    change = change_along(function, X, DIRECTION, h, value)
    return change.value / change.length


def test_the_slope_of_a_parabola_errs_by_h_one_sided_and_not_at_all_if_central():
    exact = 2 * X * DIRECTION

    assert_close(slope_of(torch.square, 0.25, X**2), exact + 0.25 * DIRECTION**2, absolute=1e-14)
    assert_close(slope_of(torch.square, 0.25), exact, absolute=1e-14)


def test_a_one_sided_change_evaluates_the_function_once_and_a_central_one_twice():
    seen = []

    def function(x):
        seen.append(x)
        return x

    change_along(function, X, DIRECTION, 0.5, value=X)
    change_along(function, X, DIRECTION, 0.5)

    expected = [X + 0.5 * DIRECTION, X + 0.5 * DIRECTION, X - 0.5 * DIRECTION]
    assert all(torch.equal(x, e) for x, e in zip(seen, expected, strict=True))


def gradient_of_sine(x):
    """The gradient of sum -cos(20 x), whose third derivative is large."""
    return 20 * torch.sin(20 * x)


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_calibrated_step_is_nearly_as_good_as_the_best_of_a_scan(dtype, central):
    x, direction = X.to(dtype), DIRECTION.to(dtype)
    exact = 400 * torch.cos(20 * X) * DIRECTION
    value = None if central else gradient_of_sine(x)

    def error(h):
        change = change_along(gradient_of_sine, x, direction, h, value)
        return ((change.value / change.length - exact).norm() / exact.norm()).item()

    found = calibrate(gradient_of_sine, x, direction, central)

    coarsest = COARSEST * math.sqrt(X[0].numel())
    best = min(error(coarsest / 2**k) for k in range(50))
    assert error(found.h) <= 10 * best
    assert found.error <= 10 * error(found.h)
    assert error(found.h) < error(coarsest) / 100


@pytest.mark.parametrize("central", [False, True])
def test_a_constant_gradient_keeps_the_coarsest_step_with_no_error(central):
    found = calibrate(lambda x: torch.ones_like(x), X, DIRECTION, central)

    assert found == (COARSEST * math.sqrt(18), 0.0)


def test_a_function_without_a_gradient_has_no_error_either():
    assert calibrate(torch.zeros_like, X, DIRECTION, central=False).error == 0.0


def test_a_function_whose_differences_never_agree_has_a_large_error():
    generator = torch.Generator().manual_seed(0)

    found = calibrate(lambda x: torch.randn(x.shape, generator=generator), X, DIRECTION, True)

    assert found.error > 0.3


def test_a_gradient_that_is_not_finite_has_no_error_that_could_be_accepted():
    assert math.isnan(calibrate(lambda x: x * math.nan, X, DIRECTION, central=True).error)


def test_steps_beyond_which_the_function_is_not_finite_are_not_chosen():
    def gradient(x):
        beyond = (x - X).norm() > 0.1 * DIRECTION.norm()
        return torch.where(beyond, math.nan, x**3)

    found = calibrate(gradient, 0 * X + X, DIRECTION, central=False)

    assert found.h < 0.1
    assert found.error < 1e-6
