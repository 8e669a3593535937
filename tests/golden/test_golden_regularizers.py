"""The regularizers against numbers of the authors' code, stored with 8 to 16 digits."""

import math

import pytest
import torch
from helpers.support import a_pass, assert_close, flat_index, float64, golden, term_alone

from difftrain.core.rng import Rng
from difftrain.objective.mmd import BANDWIDTHS, mmd
from difftrain.objective.parameterization import target
from difftrain.objective.regularizers import (
    ErrorPropagation,
    NoiseConstraint,
    StepVariation,
)
from difftrain.objective.regularizers.noise_constraint import coefficient
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.types import Batch

WRITTEN = 1e-11
STABLE_DIFFUSION = NoiseSchedule.scaled_linear()

# Step variation

VARIATION = golden("step_variation")
INDEX = flat_index(3, 2, 2, 2)
Y = torch.cos(0.91 * INDEX + 0.2)  # the regularizer divides by sqrt(8)


class GivenDirection(Rng):
    """Draws the stored y as the direction."""

    def child(self, prefix):
        return self

    def normal(self, shape, stream):
        assert stream == "direction"
        return Y


class Tanh(torch.nn.Module):
    """tanh(W x) of the flat x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(
            0.3 * torch.sin(0.7 * flat_index(64)).reshape(8, 8)
            + 0.2 * torch.eye(8, dtype=torch.float64)
        )

    def forward(self, x, t, cond):
        return torch.tanh(x.flatten(1) @ self.weight.T).reshape(x.shape)


def varied(
    network, regularizer, mean=0.0, kind="epsilon", schedule=STABLE_DIFFUSION, t=(10, 500, 900)
):
    """Return the losses of the stored case, with this regularizer alone."""
    regularizer.mean_variation.fill_(mean)
    objective = term_alone(regularizer, kind, schedule, t, torch.cos(0.53 * INDEX))
    with objective.context():
        return objective(network, Batch(torch.sin(0.37 * INDEX)), GivenDirection(0, 0, range(3)))


def r_of(network, **case):
    """Return each r [3], the running mean of a batch in which that sample alone counts."""
    found = []
    for i in range(3):
        importance = torch.zeros(3, dtype=torch.float64)
        importance[i] = 3.0  # the mean over samples is then that of one
        regularizer = StepVariation(method="double_backward", measured_batches=1)
        objective = term_alone(
            regularizer,
            case.get("kind", "epsilon"),
            case.get("schedule", STABLE_DIFFUSION),
            case.get("t", (10, 500, 900)),
            torch.cos(0.53 * INDEX),
            importance,
        )
        with objective.context():
            objective(network, Batch(torch.sin(0.37 * INDEX)), GivenDirection(0, 0, range(3)))
        found.append(regularizer.mean_variation.clone())
    return torch.stack(found)


def test_the_variation_of_each_sample_is_the_authors():
    assert_close(r_of(Tanh()), float64(VARIATION["r"]), relative=WRITTEN)


@pytest.mark.parametrize(
    "stored", VARIATION["tanh"], ids=lambda stored: f"mean={stored['mean before']}"
)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "double_backward"}, WRITTEN),
        ({"central": True, "step_size": 1e-4}, 1e-7),
        ({}, 1e-5),
    ],
    ids=["double_backward", "central", "one-sided"],
)
def test_penalty_running_mean_and_gradient_are_the_authors(options, error, stored):
    """The differences err by h^2 = 1e-8 and by the calibrated h of 1e-7, times curvatures to 10."""
    network, regularizer = Tanh(), StepVariation(**options)
    losses = varied(network, regularizer, stored["mean before"])
    losses.total.backward()

    assert_close(losses.total, stored["penalty"], relative=WRITTEN)
    assert_close(regularizer.mean_variation, stored["mean"], relative=WRITTEN)
    assert_close(network.weight.grad.norm(), stored["norm of the gradient by W"], relative=error)
    assert_close(network.weight.grad[0, 0], stored["gradient by W[0, 0]"], relative=error)


def test_variation_of_a_linear_network_is_the_stored_one():
    stored, regularizer = VARIATION["eps = 0.4 x"], StepVariation(method="double_backward")
    losses = varied(lambda x, t, cond: 0.4 * x, regularizer, stored["mean before"])

    assert_close(r_of(lambda x, t, cond: 0.4 * x), float64(stored["r"]), relative=WRITTEN)
    assert_close(losses.total, stored["penalty"], relative=WRITTEN)
    assert_close(regularizer.mean_variation, stored["mean"], relative=WRITTEN)


def length_of_y():
    return Y.flatten(1).norm(dim=1) / math.sqrt(8)


def test_variation_on_a_flow_schedule_is_the_stored_one():
    # Sigma = (i + 1) / T.
    case = dict(kind="flow_prediction", schedule=NoiseSchedule.flow(), t=(599, 599, 599))

    assert_close(
        r_of(lambda x, t, cond: 0.3 * x, **case),
        VARIATION["r over |y|"]["flow, sigma = 0.6, u = 0.3 x"] * length_of_y(),
        relative=WRITTEN,
    )


def test_variation_is_the_same_for_the_same_function_through_v():
    slope = VARIATION["v of eps = 0.4 x at t = 500, over x"]
    stored = VARIATION["r over |y|"]["t = 500, eps = 0.4 x"]
    x, level = torch.ones(1, 1, dtype=torch.float64), STABLE_DIFFUSION.level(torch.tensor([500]))
    x0 = (x - level.sigma * 0.4 * x) / level.alpha

    assert_close(target("v_prediction", x0, 0.4 * x, level), slope * x, relative=WRITTEN)
    for kind, of_x in (("epsilon", 0.4), ("v_prediction", slope)):
        found = r_of(lambda x, t, cond, of_x=of_x: of_x * x, kind=kind, t=(500, 500, 500))
        assert_close(found, stored * length_of_y(), relative=WRITTEN)


# Noise constraint

CONSTRAINT = golden("noise_constraint")
EPS_HAT = torch.sin(0.37 * flat_index(1, 2, 5, 2, 3))
X_T = torch.cos(0.21 * flat_index(1, 2, 5, 2, 3))


def constrained(eps_hat, x_t, t, **options):
    """Return the term of a network that outputs eps_hat at x_t, which is noise alone: x0 = 0."""
    level = STABLE_DIFFUSION.level(torch.tensor(t))
    objective = term_alone(
        NoiseConstraint(weight=1.0, **options),
        "epsilon",
        STABLE_DIFFUSION,
        t,
        x_t / expand_like(level.sigma, x_t),
    )
    return objective(
        lambda x, t, cond: eps_hat, Batch(torch.zeros_like(x_t)), Rng(0, 0, range(len(t)))
    ).total


@pytest.mark.parametrize("t", CONSTRAINT["coefficient"])
def test_the_coefficient_of_the_noise_constraint_is_the_authors(t):
    at = torch.tensor([int(t)])
    found = coefficient(STABLE_DIFFUSION.level(at), STABLE_DIFFUSION.level_before(at))

    # A difference of numbers that agree in 3 digits.
    assert_close(found, float64([CONSTRAINT["coefficient"][t]]), relative=1e-9)


def test_the_coefficient_at_t_0_is_not_that_of_the_level_of_index_minus_1():
    wrong = CONSTRAINT[
        "official coefficient at t = 0: index -1 is taken for the level below, wrong"
    ]
    first = STABLE_DIFFUSION.level(torch.tensor([0]))
    last = STABLE_DIFFUSION.level(torch.tensor([-1]))

    # What the stored number is.
    assert_close(coefficient(first, last), float64([wrong]), relative=WRITTEN)
    assert coefficient(first, STABLE_DIFFUSION.level_before(torch.tensor([0]))).item() < 0


@pytest.mark.parametrize("t", CONSTRAINT["full"])
def test_the_noise_constraint_is_the_authors(t):
    assert_close(constrained(EPS_HAT, X_T, [int(t)]), CONSTRAINT["full"][t], relative=WRITTEN)
    assert_close(
        constrained(EPS_HAT, X_T, [int(t)], manner="simple"), CONSTRAINT["simple"], relative=WRITTEN
    )


def test_the_noise_constraint_of_two_videos_has_a_coefficient_for_each():
    two = torch.cat([EPS_HAT, 0.5 * EPS_HAT])[..., :2], torch.cat([X_T, 0.7 * X_T])[..., :2]
    wrong = CONSTRAINT[
        "official, two videos: the coefficients are broadcast over the columns, wrong"
    ]

    assert_close(constrained(*two, [100, 900]), CONSTRAINT["two videos"], relative=WRITTEN)
    t = torch.tensor([100, 900])
    slope = coefficient(STABLE_DIFFUSION.level(t), STABLE_DIFFUSION.level_before(t)) / 1000
    difference = [2 * q[:, :, 1:-1] - q[:, :, :-2] - q[:, :, 2:] for q in two]
    # What the stored number is.
    assert_close((difference[0] - difference[1] * slope).abs().mean(), wrong, relative=WRITTEN)


# Error propagation

PROPAGATION = golden("error_propagation")
X, OTHER = torch.sin(flat_index(4, 3)), torch.cos(1.3 * flat_index(4, 3))
SETS = {
    "points": (float64([[0, 0], [1, 0]]), float64([[0, 1], [2, 2]])),
    "X, Y": (X, OTHER),
    "X, X": (X, X),
    "X, Y + 10": (X, OTHER + 10),
    "X, Y + 1000000": (X, OTHER + 1e6),
    "7 X, 7 Y": (7 * X, 7 * OTHER),
    "X[:3], Y and X[3:]": (X[:3], torch.cat([OTHER, X[3:]])),
    "X[:1], Y[:1]": (X[:1], OTHER[:1]),
}


@pytest.mark.parametrize("name", SETS)
def test_the_discrepancy_of_two_sets_is_the_authors(name):
    found = mmd(*SETS[name])[0]

    # Half of the last bit of 7.5 in float32.
    assert_close(found, PROPAGATION[name]["official"], absolute=2.4e-7)
    if "float64" in PROPAGATION[name]:
        assert_close(found, PROPAGATION[name]["float64"], relative=1e-14)


def test_the_discrepancy_of_two_points_is_that_of_their_bandwidth():
    of_far = sum(math.exp(-1 / width) for width in BANDWIDTHS)

    assert_close(of_far, PROPAGATION["S"], absolute=1e-7)
    assert_close(mmd(*SETS["X[:1], Y[:1]"])[0], 2 * (5 - of_far), relative=1e-14)


@pytest.mark.parametrize("num", ["64", "4"])
def test_the_biased_statistic_of_equal_distributions_has_the_stored_floor(num):
    n = int(num)
    draws = torch.randn(
        2 * n, 3072, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    v, u = mmd(draws[:n], draws[n:])

    stored, written = PROPAGATION["floor"][num], {"64": 1e-4, "4": 1e-3}[num]
    assert_close(2 / n * (5 - PROPAGATION["S"]), stored, absolute=written)
    # Squared distances of 3072-d normal numbers vary by 2.6 %.
    assert_close(v - u, stored, relative=0.02)
    assert_close(v, stored, absolute=0.05 * stored)


class Fixed(ErrorPropagation):
    """Rolls out from head 865 over 4 steps."""

    def draw(self, p):
        return 865, 4


def test_the_roll_out_visits_the_authors_indices_with_half_of_the_batch():
    seen = []

    def network(x, t, cond):
        seen.append((t.tolist(), len(x)))
        return 0.1 * x

    p = a_pass(
        network,
        Batch(torch.sin(flat_index(8, 1, 2, 2))),
        "v_prediction",
        NoiseSchedule.sigmoid(),
        Rng(0, 0, range(8)),
    )
    del seen[:]
    Fixed()(p)

    assert seen == [([index] * 4, 4) for index in PROPAGATION["indices from head 865 to 861"]]


def test_the_expected_number_of_steps_is_the_stored_one():
    by_enumeration = sum(min(head, n) for head in range(1, 1000) for n in range(1, 6)) / (999 * 5)
    p = a_pass(
        lambda x, t, cond: x,
        Batch(X.reshape(4, 3, 1, 1)),
        "epsilon",
        NoiseSchedule.linear(),
        Rng(0, 0, range(4)),
    )
    counts = []
    for step in range(3000):
        p.rng.step = step
        counts.append(ErrorPropagation().draw(p)[1])

    assert_close(by_enumeration, PROPAGATION["expected steps"], relative=1e-14)
    # 4 standard errors of 1..5.
    assert_close(
        torch.tensor(counts).double().mean(), by_enumeration, absolute=4 * math.sqrt(2.0 / 3000)
    )
