"""Objectives on Gaussian data, whose optimal denoiser and least loss are known in closed form.

Data N(mean, std^2), input x = alpha x0 + sigma (eps + gamma xi): target p x0 + q eps and x are
jointly Gaussian, so the optimal output is linear in x and the least error is the conditional
variance (support.Gaussian). Losses of 3,000 images must lie within 4 standard errors of the mean of
weight(t) least error(t) over all t.
"""

import pytest
import torch
from helpers.support import (
    PARAMETERIZATIONS,
    Gaussian,
    RememberingRng,
    assert_close,
    assert_within_standard_errors,
    mixture,
)

from difftrain.core.errors import InputError
from difftrain.objective.noise import InputPerturbation
from difftrain.objective.objective import Objective
from difftrain.objective.parameterization import squared_error_scale
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.timesteps import LogitNormal, Stratified, TimestepRange, Uniform
from difftrain.objective.weightings import (
    P2,
    Debiased,
    MinSNR,
    SoftMinSNR,
    TruncatedSNR,
    Unit,
)

NUM = 3_000
ALL_T = torch.arange(1000)
BATCH = Gaussian().batch(NUM)
RNG = RememberingRng(7, 0, range(NUM))
LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow()
CASES = [(LINEAR, kind) for kind in PARAMETERIZATIONS] + [
    (FLOW, kind) for kind in PARAMETERIZATIONS if kind != "epsilon"
]
cases = pytest.mark.parametrize(
    ("schedule", "kind"), CASES, ids=lambda v: v.kind if isinstance(v, NoiseSchedule) else v
)
weightings = pytest.mark.parametrize(
    "weighting",
    [Unit(), P2(0.5), Debiased(), MinSNR(5.0), SoftMinSNR(4.0), TruncatedSNR()],
    ids=repr,
)


def weight_on(kind, weighting, level):
    """Return the weighting on kind's error: w scale(stated for) / scale(kind), or its limit."""
    level = NoiseLevel(level.alpha.clamp(min=1e-9), level.sigma)
    stated = weighting.stated_for or kind
    return weighting(level) * squared_error_scale(stated, level) / squared_error_scale(kind, level)


def weighted_errors(objective, denoiser, batch=BATCH):
    """Return each sample's addend of the mean that the objective returns."""
    losses = objective(denoiser, batch, RNG)
    timesteps = objective.timesteps(objective.schedule.num_timesteps, RNG)
    addends = objective.weights[timesteps.t] * timesteps.importance * losses.errors
    assert_close(losses.total, addends.mean(), relative=1e-12)
    return addends


@weightings
@cases
def test_loss_of_the_optimal_denoiser(schedule, kind, weighting):
    data, level = Gaussian(), schedule.level(ALL_T)
    expected = (weight_on(kind, weighting, level) * data.optimal_error(kind, level)).mean()

    addends = weighted_errors(Objective(schedule, kind, weighting), data.denoiser(kind, schedule))

    assert_within_standard_errors(addends, expected, 4)


@weightings
@cases
def test_loss_of_the_optimal_denoiser_of_perturbed_inputs_with_clean_targets(
    schedule, kind, weighting
):
    data, level = Gaussian(gamma=0.1), schedule.level(ALL_T)
    expected = (weight_on(kind, weighting, level) * data.optimal_error(kind, level)).mean()
    objective = Objective(schedule, kind, weighting, perturbation=InputPerturbation(0.1, "clean"))

    assert_within_standard_errors(
        weighted_errors(objective, data.denoiser(kind, schedule)), expected, 4
    )


@weightings
@cases
def test_loss_of_the_optimal_denoiser_of_perturbed_inputs_with_implied_eps_is_epsilons(
    schedule, kind, weighting
):
    data, level = Gaussian(gamma=0.1), schedule.level(ALL_T)
    if schedule is FLOW and weighting in (
        Debiased(),
        TruncatedSNR(),
    ):  # on the eps error these diverge at SNR = 0
        with pytest.raises(
            InputError, match=r"on the epsilon error grows without bound where SNR = 0 \(t = 999"
        ):
            Objective(schedule, kind, weighting, perturbation=InputPerturbation(0.1, "implied_eps"))
        return
    # At SNR = 0 the implied eps is eps + gamma xi.
    least = torch.where(level.alpha > 0, data.optimal_error("epsilon", level), 0.1**2)
    expected = (weight_on("epsilon", weighting, level) * least).mean()
    objective = Objective(
        schedule, kind, weighting, perturbation=InputPerturbation(0.1, "implied_eps")
    )

    assert_within_standard_errors(
        weighted_errors(objective, data.denoiser_by_eps(kind, schedule)), expected, 4
    )


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_implied_eps_is_the_same_loss_for_every_parameterization_sample_by_sample(kind):
    data = Gaussian(gamma=0.1)
    of = [
        weighted_errors(
            Objective(LINEAR, k, P2(0.5), perturbation=InputPerturbation(0.1, "implied_eps")),
            data.denoiser_by_eps(k, LINEAR),
        )
        for k in (kind, "epsilon")
    ]
    # Through x0 and back: sigma^2 >= 1e-4 and alpha^2 >= 4e-5 magnify 1e-16.
    assert_close(of[0], of[1], relative=1e-6)


@pytest.mark.parametrize(
    ("timesteps", "density"),
    [
        (Uniform(), torch.ones(1000)),
        (LogitNormal(0.0, 2.0, unbiased=True), torch.ones(1000)),
        (LogitNormal(0.3, 1.0), 1000 * LogitNormal(0.3, 1.0).probability(ALL_T, 1000)),
        (TimestepRange(100, 299), torch.where((ALL_T >= 100) & (ALL_T < 300), 5.0, 0.0)),
    ],
    ids=["uniform", "unbiased logit normal", "logit normal", "range"],
)
def test_loss_is_the_mean_over_the_density_of_the_timesteps(timesteps, density):
    data, level = Gaussian(), LINEAR.level(ALL_T)
    expected = (density * P2(0.5)(level) * data.optimal_error("epsilon", level)).mean()

    addends = weighted_errors(
        Objective(LINEAR, "epsilon", P2(0.5), timesteps=timesteps), data.denoiser("epsilon", LINEAR)
    )

    assert_within_standard_errors(addends, expected, 4)


def test_stratified_timesteps_have_the_same_loss_with_less_variance():
    data, level = Gaussian(), LINEAR.level(ALL_T)
    expected = (Debiased()(level) * data.optimal_error("epsilon", level)).mean()

    addends = weighted_errors(
        Objective(LINEAR, "epsilon", Debiased(), timesteps=Stratified()),
        data.denoiser("epsilon", LINEAR),
    )

    # The standard error of independent t overstates it.
    assert_within_standard_errors(addends, expected, 2)


def slope_that_minimizes(objective, batch):
    """Return the best k of `output = k x` and the curvature: a parabola through three losses."""
    low, middle, high = (
        objective(lambda x, t, cond, k=k: k * x, batch, RNG).total.item() for k in (-1.0, 0.0, 1.0)
    )
    curvature = (low - 2 * middle + high) / 2
    return (low - high) / (4 * curvature), curvature


@pytest.mark.parametrize("target", ["clean", "implied_eps"])
@pytest.mark.parametrize("t", [100, 500, 900])
def test_the_minimizer_under_input_perturbation_is_the_published_one_not_the_traps(t, target):
    gamma, data = 0.5, Gaussian(mean=0.0, gamma=0.5)
    level, batch = LINEAR.level(torch.tensor([t])), Gaussian(mean=0.0).batch(NUM)
    objective = Objective(
        LINEAR,
        "epsilon",
        timesteps=TimestepRange(t, t),
        perturbation=InputPerturbation(gamma, target),
    )

    found, variance = slope_that_minimizes(objective, batch)

    published = data.slope("epsilon", level).item()  # regress eps on x
    trap = published * (1 + gamma**2)  # regress eps + gamma xi on x
    # Of a regression's slope, 8 places an image.
    error = (data.optimal_error("epsilon", level).item() / (variance * NUM * 8)) ** 0.5
    assert abs(found - published) <= 4 * error
    assert abs(found - trap) > 10 * error


def loss_in_closed_form(data, kind, level, slope, second_moment=1.0, in_target=False):
    """Return E |p x0 + q eps - slope x|^2, x = alpha x0 + sigma (eps + gamma xi), data of mean 0.

    second_moment is that of xi. With in_target, xi belongs to the target's noise too:
    p x0 + q (eps + gamma xi).
    """
    p, q = mixture(kind, level)
    of_xi = (q if in_target else 0) - slope * level.sigma
    return (
        (p - slope * level.alpha) ** 2 * data.std**2
        + (q - slope * level.sigma) ** 2
        + (of_xi * data.gamma) ** 2 * second_moment
    )


TRAPS = {
    "the same noise in the target": {"in_target": True},
    "uniform in (0, 1), or (-1, 1), instead of Gaussian": {"second_moment": 1 / 3},
    "one strength in (0, gamma) for a batch": {"second_moment": 1 / 3},  # its mean over batches
}


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_the_loss_in_closed_form_at_the_optimal_slope_is_the_least_error(kind):
    data, level = Gaussian(mean=0.0, gamma=0.5), LINEAR.level(ALL_T)

    found = loss_in_closed_form(data, kind, level, data.slope(kind, level))

    assert_close(found, data.optimal_error(kind, level), relative=1e-9)


@pytest.mark.parametrize("target", ["clean", "implied_eps"])
@pytest.mark.parametrize("trap", TRAPS)
@cases
def test_the_loss_under_input_perturbation_is_the_published_one_not_a_traps(
    schedule, kind, trap, target
):
    """The network implies -2 x as what is compared: unlike the optimal one it passes xi on."""
    if trap == "the same noise in the target" and kind == "sample" and target == "clean":
        pytest.skip("the target is x0: no noise is in it")
    t = 500
    gamma = 1.0
    slope = -2.0
    data, level = Gaussian(mean=0.0, gamma=gamma), schedule.level(torch.tensor([t]))
    # x0 that slope x as eps implies.
    (p, q) = mixture(kind, level)
    of_x0 = (1 - slope * level.sigma) / level.alpha
    of_output, error = (slope, kind) if target == "clean" else (p * of_x0 + q * slope, "epsilon")
    objective = Objective(
        schedule, kind, timesteps=TimestepRange(t, t), perturbation=InputPerturbation(gamma, target)
    )

    errors = objective(lambda x, t, cond: of_output * x, Gaussian(mean=0.0).batch(NUM), RNG).errors

    published, other = (
        loss_in_closed_form(data, error, level, slope, **more).item() for more in ({}, TRAPS[trap])
    )
    assert_within_standard_errors(errors, published, 4)
    assert abs(other - published) > 12 * errors.std() / NUM**0.5


@pytest.mark.parametrize(
    ("kind", "same"),
    [("sample", False), ("v_prediction", False), ("flow_prediction", False), ("epsilon", True)],
)
def test_clean_targets_and_implied_eps_have_different_minimizers_except_for_epsilon(kind, same):
    batch, t = Gaussian(mean=0.0).batch(NUM), 500
    implied = []
    for target in ("clean", "implied_eps"):
        objective = Objective(
            LINEAR, kind, timesteps=TimestepRange(t, t), perturbation=InputPerturbation(0.5, target)
        )
        slope, _ = slope_that_minimizes(objective, batch)
        x = torch.ones(1, 1, dtype=torch.float64)
        level = LINEAR.level(torch.tensor([t]))
        implied.append(eps_of(kind, slope * x, x, level).item())

    epsilon = Gaussian(mean=0.0, gamma=0.5).slope("epsilon", LINEAR.level(torch.tensor([t]))).item()
    assert abs(implied[1] - epsilon) < 0.01  # implied_eps regresses eps, whatever the output
    assert (abs(implied[0] - epsilon) < 0.01) == same


def eps_of(kind, output, x, level):
    alpha, sigma = expand_like(level.alpha, x), expand_like(level.sigma, x)
    return {
        "epsilon": output,
        "sample": (x - alpha * output) / sigma,
        "v_prediction": sigma * x + alpha * output,
        "flow_prediction": (x + alpha * output) / (alpha + sigma),
    }[kind]
