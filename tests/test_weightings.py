"""Each weighting against its formula, its limits, and its conversion between parameterizations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PARAMETERIZATIONS, assert_close, images

from difftrain.parameterization import estimate, target
from difftrain.registry import InputError
from difftrain.schedule import NoiseLevel, NoiseSchedule, diffuse, expand_like
from difftrain.weightings import P2, Debiased, MinSNR, SoftMinSNR, TruncatedSNR, Unit, converted, weight_table

SNR = torch.logspace(-4, 4, 17, dtype=torch.float64)
LEVEL = NoiseLevel((SNR / (1 + SNR)).sqrt(), (1 / (1 + SNR)).sqrt())
EVERY_WEIGHTING = [Unit(), P2(0.5), P2(1.0), P2(2.0, k=0.5), Debiased(), MinSNR(5.0), SoftMinSNR(4.0), TruncatedSNR()]
amounts = st.lists(st.floats(0.05, 3.0), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


@pytest.mark.parametrize(("weighting", "expected"), [
    (Unit(), SNR**0),
    (P2(0.5, k=2.0), 1 / (2 + SNR).sqrt()),
    (Debiased(), SNR**-0.5),
    (Debiased(max_weight=3.0), torch.minimum(SNR**-0.5, torch.tensor(3.0))),
    (MinSNR(5.0), torch.minimum(SNR, torch.tensor(5.0)) / SNR),
    (SoftMinSNR(4.0), 4 / (SNR + 4)),
    (TruncatedSNR(), torch.maximum(SNR, torch.tensor(1.0))),
], ids=lambda value: repr(value) if not isinstance(value, torch.Tensor) else "")
def test_weight_is_its_formula(weighting, expected):
    assert_close(weighting(LEVEL), expected, relative=1e-11)


@pytest.mark.parametrize(("weighting", "of_x0"), [
    (MinSNR(5.0), torch.minimum(SNR, torch.tensor(5.0))),
    (SoftMinSNR(4.0), 4 * SNR / (SNR + 4)),
    (TruncatedSNR(), torch.maximum(SNR, torch.tensor(1.0))),
    (Debiased(), SNR**0.5),
], ids=["min_snr", "soft_min_snr", "truncated_snr", "debiased"])
def test_weight_of_the_sample_error_is_the_published_form(weighting, of_x0):
    assert_close(converted(weighting, "sample", LEVEL), of_x0, relative=1e-11)


def test_truncated_snr_on_epsilon_is_at_least_one():
    assert_close(converted(TruncatedSNR(), "epsilon", LEVEL), torch.maximum(1 / SNR, torch.tensor(1.0)), relative=1e-11)


@pytest.mark.parametrize(("weighting", "same"), [
    (P2(gamma=0.0), Unit()), (MinSNR(gamma=1e6), Unit()), (Debiased(max_weight=1e6), Debiased()),
], ids=["p2", "min_snr", "debiased"])
def test_weighting_at_its_limit_is_the_other_one(weighting, same):
    assert torch.equal(weighting(LEVEL), same(LEVEL))


def test_soft_min_snr_is_a_scaled_p2():
    assert_close(SoftMinSNR(4.0)(LEVEL), 4 * P2(1.0, k=4.0)(LEVEL), relative=1e-14)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_unit_weighs_whatever_error_is_trained_by_one(kind):
    assert torch.equal(converted(Unit(), kind, LEVEL), torch.ones(17, dtype=torch.float64))


@pytest.mark.parametrize("weighting", EVERY_WEIGHTING[1:], ids=repr)
@given(alpha=amounts, sigma=amounts)
def test_converted_weight_has_the_same_gradient_on_x0_through_every_parameterization(weighting, alpha, sigma):
    level, x0, eps = NoiseLevel(alpha, sigma), images(3), images(3, seed=1)
    x_t = diffuse(x0, eps, level)
    gradients = {}
    for kind in PARAMETERIZATIONS:
        x0_hat = images(3, seed=2).requires_grad_(True)
        eps_hat = (x_t - expand_like(alpha, x_t) * x0_hat) / expand_like(sigma, x_t)
        output = target(kind, x0_hat, eps_hat, level)  # the output that implies x0_hat at this x_t
        assert_close(estimate(kind, output, x_t, level).x0, x0_hat, absolute=1e-11)
        errors = (output - target(kind, x0, eps, level)).square().flatten(1).mean(1)
        gradients[kind], = torch.autograd.grad((converted(weighting, kind, level) * errors).sum(), x0_hat)

    for kind in PARAMETERIZATIONS:
        assert_close(gradients[kind], gradients["epsilon"], relative=1e-9, absolute=1e-12)


ENDS = NoiseLevel(torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double())


@pytest.mark.parametrize(("weighting", "kind", "at_snr_0_and_infinity"), [
    (P2(1.0), "sample", [0, 1]), (P2(2.0), "sample", [0, 0]), (P2(1.0), "v_prediction", [0, 0]), (P2(1.0), "epsilon", [1, 0]),
    (Debiased(), "v_prediction", [0, 0]), (Debiased(), "flow_prediction", [0, 0]),
    (MinSNR(5.0), "epsilon", [1, 0]), (MinSNR(5.0), "sample", [0, 5]), (MinSNR(5.0), "v_prediction", [0, 0]),
    (SoftMinSNR(4.0), "sample", [0, 4]), (TruncatedSNR(), "v_prediction", [1, 1]),
], ids=str)
def test_weight_at_the_ends_of_a_schedule_is_its_limit(weighting, kind, at_snr_0_and_infinity):
    assert_close(converted(weighting, kind, ENDS), torch.tensor(at_snr_0_and_infinity), absolute=1e-11)
    from_noise_to_image = NoiseSchedule(ENDS.alpha.flip(0), ENDS.sigma.flip(0), {})
    assert_close(weight_table(weighting, kind, from_noise_to_image), torch.tensor(at_snr_0_and_infinity).flip(0), absolute=1e-11)


def schedule_ending_at(alpha, sigma):
    return NoiseSchedule(torch.tensor([0.9, alpha]), torch.tensor([0.3, sigma]), {})


@pytest.mark.parametrize(("weighting", "kind", "ends", "snr"), [
    (Debiased(), "sample", (1.0, 0.0), "infinity"), (P2(0.5), "sample", (1.0, 0.0), "infinity"),
    (P2(0.95), "sample", (1.0, 0.0), "infinity"), (TruncatedSNR(), "sample", (1.0, 0.0), "infinity"),
    (Debiased(), "epsilon", (0.0, 1.0), "0"), (TruncatedSNR(), "epsilon", (0.0, 1.0), "0"),
])
def test_a_weight_that_diverges_on_the_schedule_is_refused(weighting, kind, ends, snr):
    with pytest.raises(InputError) as error:
        weight_table(weighting, kind, schedule_ending_at(*ends))
    assert str(error.value) == (
        f"weighting {type(weighting).__name__} on the {kind} error grows without bound where SNR = {snr} (t = 1 of this schedule). "
        "Use a schedule without zero terminal SNR, parameterization: v_prediction, or weighting: {type: min_snr}."
    )


def test_debiased_with_a_maximum_is_accepted_where_it_would_diverge():
    assert_close(weight_table(Debiased(max_weight=7.0), "epsilon", schedule_ending_at(0.0, 1.0)), torch.tensor([1 / 3, 7.0]), relative=1e-7)


# Mean weight over t, of methods.md, 5 digits: another route to the tables than single rows.
@pytest.mark.parametrize(("schedule", "weighting", "mean"), [
    (NoiseSchedule.linear(), P2(1.0), 0.72449), (NoiseSchedule.linear(), P2(0.5), 0.80589), (NoiseSchedule.linear(), Debiased(), 17.817),
    (NoiseSchedule.linear(), MinSNR(5.0), 0.91307), (NoiseSchedule.cosine(), P2(1.0), 0.50442),
    (NoiseSchedule.cosine(), Debiased(), 24.809), (NoiseSchedule.cosine(), MinSNR(5.0), 0.82402),
    (NoiseSchedule.scaled_linear(), P2(1.0), 0.62663),
    (NoiseSchedule.scaled_linear(), Debiased(), 3.0213), (NoiseSchedule.scaled_linear(), MinSNR(5.0), 0.91657),
], ids=str)
def test_mean_weight_over_the_schedule_is_the_recorded_one(schedule, weighting, mean):
    assert_close(weight_table(weighting, "epsilon", schedule).mean(), mean, relative=2e-5)
