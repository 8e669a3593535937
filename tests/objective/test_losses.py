"""Each distance against its formula in elementary operations, and its limits."""

import pytest
import torch
from helpers.support import assert_close, images
from hypothesis import given
from hypothesis import strategies as st

from difftrain.objective.losses import L1, Huber, PseudoHuber, Squared, per_sample

OUTPUT, TARGET = 3 * images(3), 3 * images(3, seed=1)
D = OUTPUT - TARGET


def mean_of(values):
    return torch.stack([image.mean() for image in values])


def test_squared_error_is_the_mean_square():
    assert_close(Squared()(OUTPUT, TARGET), mean_of(D * D), relative=1e-14)


def test_l1_is_the_mean_distance():
    assert_close(L1()(OUTPUT, TARGET), mean_of(torch.maximum(D, -D)), relative=1e-14)


@given(delta=st.floats(0.05, 5.0))
def test_huber_is_quadratic_within_delta_and_linear_beyond(delta):
    def huber(d):
        return 0.5 * d * d if abs(d) <= delta else delta * (abs(d) - delta / 2)

    expected = torch.tensor(
        [[huber(d) for d in row] for row in D.flatten(1).tolist()], dtype=torch.float64
    )
    assert_close(Huber(delta)(OUTPUT, TARGET), expected.mean(1), relative=1e-13)


@given(c=st.floats(0.01, 5.0))
def test_pseudo_huber_is_its_formula(c):
    expected = mean_of(2 * c * (torch.hypot(D, torch.tensor(c, dtype=torch.float64)) - c))

    assert_close(PseudoHuber(c)(OUTPUT, TARGET), expected, relative=1e-11)


def test_huber_with_a_large_delta_is_half_the_squared_error():
    assert_close(Huber(100.0)(OUTPUT, TARGET), Squared()(OUTPUT, TARGET) / 2, relative=1e-14)


def test_pseudo_huber_tends_to_the_squared_error_for_small_and_to_l1_for_large_differences():
    small, large = 1e-4 * D, 1e6 * D
    zero = torch.zeros_like(D)

    # Next order: (d / 2c)^2.
    assert_close(PseudoHuber(0.1)(small, zero), Squared()(small, zero), relative=1e-5)
    assert_close(PseudoHuber(0.1)(large, zero), 0.2 * L1()(large, zero), relative=1e-6)


@pytest.mark.parametrize("error", [Squared(), Huber(), PseudoHuber(), L1()])
def test_half_precision_differences_are_taken_in_float32(error):
    # 300^2 overflows half precision.
    output = torch.full((1, 1, 64, 64), 300.0).half()
    target = torch.zeros(1, 1, 64, 64).half()

    found = error(output, target)

    assert found.dtype == torch.float32
    assert_close(found, error(output.double(), target.double()), relative=1e-6)


def test_only_the_squared_error_converts_between_parameterizations():
    assert Squared().squared
    assert not any(error.squared for error in (Huber(), PseudoHuber(), L1()))


def test_per_sample_averages_everything_but_the_first_dimension():
    assert_close(per_sample(torch.arange(24.0).reshape(2, 3, 2, 2)), torch.tensor([5.5, 17.5]))
