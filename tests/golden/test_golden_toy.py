"""Objectives on the shared toy against numbers of the authors' code, stored with 12 digits."""

import pytest
import torch
from helpers.support import (
    GivenPerturbation,
    assert_close,
    flat_index,
    float64,
    golden,
    rng,
    toy_batch,
    toy_eps,
    toy_network,
)

from difftrain.core.rng import Rng
from difftrain.objective.noise import InputPerturbation
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule, diffuse
from difftrain.objective.types import Timesteps
from difftrain.objective.variance import LearnedRange
from difftrain.objective.weightings import P2, Debiased, Unit, converted

WRITTEN = 1e-11
T = torch.tensor([0, 250, 500, 999])
LEVEL = NoiseSchedule.linear().level(T)


def toy_objective(parameterization="epsilon", **parts):
    return Objective(
        NoiseSchedule.linear(),
        parameterization,
        timesteps=lambda num, rng: Timesteps(T, torch.ones(4, dtype=torch.float64)),
        noise=lambda x0, rng: toy_eps(),
        **parts,
    )


def weighted_errors(objective, network=toy_network):
    """Return each sample's weighted error [4]; the total must be their mean."""
    losses = objective(network, toy_batch(), rng())
    weighted = objective.weights[T] * losses.errors
    if set(losses.terms) == {"error"}:
        assert_close(losses.total, weighted.mean(), relative=1e-14)
    return weighted


def is_close(weighted, stored):
    return bool(((weighted - float64(stored)).abs() <= 1e-6 * float64(stored)).all())


@pytest.mark.parametrize("gamma", ["0", "0.5", "1"])
def test_p2_gives_the_authors_numbers(gamma):
    assert_close(
        weighted_errors(toy_objective(weighting=P2(float(gamma)))),
        float64(golden("p2")["epsilon"][gamma]),
        relative=WRITTEN,
    )


def test_p2_does_not_put_the_epsilon_weight_on_the_raw_sample_error():
    key = "official START_X, gamma 1: the epsilon weight on the raw x0 error, not equivalent"
    raw = toy_objective("sample")(toy_network, toy_batch(), rng()).errors

    # What the stored numbers are.
    assert_close(P2(1.0)(LEVEL) * raw, float64(golden("p2")[key]), relative=WRITTEN)
    weighted = weighted_errors(toy_objective("sample", weighting=P2(1.0)))
    assert not is_close(weighted, golden("p2")[key])
    # K = 1, gamma = 1 on x0: alpha_bar.
    assert_close(weighted, LEVEL.alpha**2 * raw, relative=WRITTEN)


def test_debiased_gives_the_authors_numbers():
    assert_close(
        weighted_errors(toy_objective(weighting=Debiased())),
        float64(golden("debiased")["epsilon"]),
        relative=WRITTEN,
    )


@pytest.mark.parametrize(("parameterization", "mode"), [("sample", "x0"), ("v_prediction", "v")])
def test_debiased_does_not_put_the_epsilon_weight_on_other_raw_errors(parameterization, mode):
    stored = golden("debiased")[
        f"official {mode} mode: the epsilon weight on the raw {mode} error, not equivalent"
    ]
    raw = toy_objective(parameterization)(toy_network, toy_batch(), rng()).errors

    assert_close(Debiased()(LEVEL) * raw, float64(stored), relative=WRITTEN)
    assert not is_close(
        weighted_errors(toy_objective(parameterization, weighting=Debiased())), stored
    )


def perturbed(parameterization, target):
    xi = torch.sin(1.1 * flat_index(4, 2, 3, 3) + 0.3)
    return weighted_errors(
        toy_objective(parameterization, perturbation=GivenPerturbation(xi, 0.1, target))
    )


@pytest.mark.parametrize(
    ("parameterization", "target"),
    [
        ("epsilon", "clean"),
        ("sample", "clean"),
        ("v_prediction", "clean"),
        ("v_prediction", "implied_eps"),
    ],
)
def test_input_perturbation_gives_the_stored_numbers(parameterization, target):
    stored = golden("input_perturbation")[f"{parameterization} {target}"]

    assert_close(perturbed(parameterization, target), float64(stored), relative=WRITTEN)


@pytest.mark.parametrize("target", ["clean", "implied_eps"])
def test_input_perturbation_does_not_move_the_target(target):
    assert not is_close(
        perturbed("epsilon", target),
        golden("input_perturbation")["wrong: epsilon against eps + gamma xi"],
    )


def test_the_stored_wrong_numbers_are_those_of_the_perturbation_in_the_target():
    xi = torch.sin(1.1 * flat_index(4, 2, 3, 3) + 0.3)
    eps_in = toy_eps() + 0.1 * xi
    errors = (
        (toy_network(diffuse(toy_batch().x0, eps_in, LEVEL), T) - eps_in)
        .square()
        .flatten(1)
        .mean(1)
    )

    assert_close(
        errors,
        float64(golden("input_perturbation")["wrong: epsilon against eps + gamma xi"]),
        relative=WRITTEN,
    )


class GivenXi(Rng):
    """Draws the xi of the stored numbers."""

    def normal(self, shape, stream):
        assert stream == "perturbation"
        return torch.sin(1.1 * flat_index(len(self.samples), *shape) + 0.3)


@pytest.mark.parametrize(
    "decayed", [{}, {"decay_steps": 20}], ids=["constant", "at half of its decay"]
)
@pytest.mark.parametrize(
    ("parameterization", "target"),
    [
        ("epsilon", "clean"),
        ("epsilon", "implied_eps"),
        ("sample", "clean"),
        ("v_prediction", "clean"),
        ("v_prediction", "implied_eps"),
    ],
)
def test_the_registered_perturbation_gives_the_stored_numbers_and_not_the_wrong_ones(
    parameterization, target, decayed
):
    perturbation = InputPerturbation(0.2 if decayed else 0.1, target, **decayed)
    losses = toy_objective(parameterization, perturbation=perturbation)(
        toy_network, toy_batch(), GivenXi(0, 10, range(4))
    )

    stored = golden("input_perturbation")
    key = "epsilon clean" if parameterization == "epsilon" else f"{parameterization} {target}"
    assert_close(losses.errors, float64(stored[key]), relative=WRITTEN)
    assert not is_close(losses.errors, stored["wrong: epsilon against eps + gamma xi"])


def test_implied_eps_of_an_epsilon_model_is_its_clean_target():
    assert_close(perturbed("epsilon", "implied_eps"), perturbed("epsilon", "clean"), relative=1e-15)


def test_perturbed_input_has_the_stored_noise():
    stored = golden("input_perturbation")
    sigma = NoiseSchedule.linear().sigma[500]
    eps = torch.zeros(1, 100_000, dtype=torch.float64)

    xi = InputPerturbation(0.1)(eps, LEVEL, rng(1)) / 0.1

    assert_close(sigma, stored["sigma at t = 500"], relative=1e-14)
    assert_close(
        sigma * (1 + 0.1**2) ** 0.5, stored["noise standard deviation at t = 500"], relative=1e-14
    )
    # 4 standard errors of a variance.
    assert_close((xi**2).mean(), 1.0, absolute=4 * (2 / 100_000) ** 0.5)


@pytest.mark.parametrize("weighting", [Unit(), P2(1.0)])
def test_learned_range_adds_the_authors_bound_whatever_the_weighting(weighting):
    def network(x, t, cond):
        return torch.cat([toy_network(x, t), 0.2 * torch.tanh(x)], 1)

    objective = toy_objective(weighting=weighting, variance=LearnedRange())
    losses = objective(network, toy_batch(), rng())
    x_t = (
        LEVEL.alpha[:, None, None, None] * toy_batch().x0
        + LEVEL.sigma[:, None, None, None] * toy_eps()
    )
    estimate = (x_t - LEVEL.sigma[:, None, None, None] * toy_network(x_t, T)) / LEVEL.alpha[
        :, None, None, None
    ]
    bound = objective.variance.bound(
        toy_batch(), T, x_t, _Estimate(estimate), 0.2 * torch.tanh(x_t), objective.schedule
    )

    stored = float64(golden("p2")["learned_range"]["variational_bound"])
    # The official code ran in float32; its posterior log-variance cancels 1 - alpha_bar.
    assert_close(bound, stored, relative=3e-5)
    assert_close(losses.terms["variational_bound"], bound.mean(), relative=1e-14)
    assert_close(
        losses.terms["error"],
        (converted(weighting, "epsilon", LEVEL) * losses.errors).mean(),
        relative=1e-14,
    )
    assert_close(
        losses.total, losses.terms["error"] + losses.terms["variational_bound"], relative=1e-14
    )


class _Estimate:
    def __init__(self, x0):
        self.x0 = x0
