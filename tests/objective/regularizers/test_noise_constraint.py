"""The noise constraint by hand, on Gaussian frames, and at its limits."""

import itertools
import math

import pytest
import torch
from helpers.support import (
    PARAMETERIZATIONS,
    a_pass,
    assert_close,
    gradients,
    mixture,
    rng,
    term_alone,
)
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import NoiseConstraint, StepVariation
from difftrain.objective.regularizers.noise_constraint import (
    coefficient,
    second_difference,
)
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.types import Batch
from difftrain.objective.variance import LearnedRange

LINEAR = NoiseSchedule.linear()
FLOW = NoiseSchedule.flow()
SIGMOID = NoiseSchedule.sigmoid()
ENDING = NoiseSchedule.linear(zero_terminal_snr=True)
T = torch.tensor([0, 40, 700, 999])


def clips(num=4, frames=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(num, 2, frames, 3, 2, generator=generator, dtype=torch.float64) - 1


BATCH = Batch(clips())


class Wave(nn.Module):
    """Implies eps = sin(a x + b), whatever it outputs."""

    def __init__(self, kind="epsilon", schedule=LINEAR):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.kind, self.schedule = kind, schedule

    def eps(self, x):
        return torch.sin(self.a * x + self.b)

    def forward(self, x, t, cond):
        if self.schedule.kind == "flow":
            t = (t / 1000 * self.schedule.num_timesteps).round().long() - 1
        level = self.schedule.level(t)
        alpha = expand_like(level.alpha, x)
        sigma = expand_like(level.sigma, x)
        p, q = mixture(self.kind, level)
        x0 = (x - sigma * self.eps(x)) / alpha
        return expand_like(p, x) * x0 + expand_like(q, x) * self.eps(x)


def losses_of(regularizer, network, kind="epsilon", schedule=LINEAR, batch=BATCH, t=T):
    return term_alone(regularizer, kind, schedule, t)(network, batch, rng(len(batch.x0)))


def by_hand(eps, x_t, schedule, t, scale=1000.0):
    """Return the formula, frame by frame and video by video."""
    found = []
    for b in range(len(x_t)):
        at = int(t[b])
        alpha, sigma = schedule.alpha[at], schedule.sigma[at]
        alpha_s, sigma_s = 1.0, 0.0
        if at > 0:
            alpha_s, sigma_s = schedule.alpha[at - 1], schedule.sigma[at - 1]
        slope = alpha / (alpha * sigma_s - alpha_s * sigma)
        frames = [
            (2 * eps[b, :, i] - eps[b, :, i - 1] - eps[b, :, i + 1])
            - (2 * x_t[b, :, i] - x_t[b, :, i - 1] - x_t[b, :, i + 1]) * slope / scale
            for i in range(1, x_t.shape[2] - 1)
        ]
        found.append(torch.stack(frames).abs().mean())
    return torch.stack(found)


CASES = list(itertools.product((LINEAR, SIGMOID), PARAMETERIZATIONS))
CASES += [(FLOW, kind) for kind in PARAMETERIZATIONS if kind != "epsilon"]


@pytest.mark.parametrize(
    ("schedule", "kind"), CASES, ids=lambda v: v if isinstance(v, str) else "on"
)
def test_every_parameterization_has_the_value_and_gradient_of_the_formula_on_the_implied_eps(
    schedule, kind
):
    # At the end of the flow schedule alpha is 0, and eps implies no output there.
    t = torch.tensor([0, 40, 700, 998])
    network, regularizer = Wave(kind, schedule), NoiseConstraint(weight=1.0, scale=300.0)
    losses = losses_of(regularizer, network, kind, schedule, t=t)
    level, eps = schedule.level(t), rng().normal((2, 5, 3, 2), "noise").double()
    x_t = expand_like(level.alpha, eps) * BATCH.x0 + expand_like(level.sigma, eps) * eps

    expected = by_hand(network.eps(x_t), x_t, schedule, t, 300.0).mean()
    # From eps to x0 and back, at alpha and sigma of 0.001.
    assert_close(losses.total, expected, relative=1e-9)
    assert_close(
        gradients(losses, network),
        torch.stack(torch.autograd.grad(expected, list(network.parameters()))),
        relative=1e-8,
    )


@pytest.mark.parametrize("schedule", [LINEAR, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("t", [0, 1, 300, 998])
def test_size_of_the_term_on_independent_gaussian_frames(schedule, t):
    """eps_hat = k (x - alpha mean) makes both second differences multiples of that of x.

    It is N(0, 6 Var(x)), and E|N(0, s^2)| = s sqrt(2 / pi).
    """
    num = 20_000
    std = 0.7
    k = 0.8
    x0 = 0.3 + std * torch.randn(
        num, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    noise = torch.randn(
        num, 1, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    at = torch.full((num,), t)
    level = schedule.level(at[:1])
    slope = coefficient(level, schedule.level_before(at[:1])) / 1000
    kind = "epsilon" if schedule is LINEAR else "v_prediction"
    p, q = mixture(kind, level)

    def network(x, time, cond):
        eps = k * (x - level.alpha * 0.3)
        return p * (x - level.sigma * eps) / level.alpha + q * eps

    found = term_alone(NoiseConstraint(weight=1.0), kind, schedule, at, noise)(
        network, Batch(x0), Rng(0, 0, range(num))
    ).total

    size = (k - slope).abs() * torch.sqrt(6 * (level.alpha**2 * std**2 + level.sigma**2))
    error = 4 * size * math.sqrt((1 - 2 / math.pi) / num)
    assert_close(found, (size * math.sqrt(2 / math.pi))[0], absolute=error.item())


def test_the_value_of_a_sample_is_that_of_the_sample_alone():
    p = a_pass(Wave(), BATCH, "epsilon", LINEAR, rng(), t=T)
    values = NoiseConstraint()(p)

    assert values.shape == (4,)
    for i in range(4):
        own = a_pass(
            Wave(), Batch(BATCH.x0[i : i + 1]), "epsilon", LINEAR, Rng(0, 0, [i]), t=T[i : i + 1]
        )
        assert_close(NoiseConstraint()(own), values[i : i + 1], relative=1e-12)


def test_simple_is_the_limit_of_a_large_scale():
    simple, full = (
        losses_of(NoiseConstraint(**options), Wave()).total
        for options in ({"manner": "simple"}, {"scale": 1e12})
    )

    assert_close(full, simple, relative=1e-8)
    assert abs(losses_of(NoiseConstraint(), Wave()).total / simple - 1) > 1e-3


def test_where_snr_is_0_full_is_simple_and_finite():
    last, network = torch.tensor([999, 999]), nn.Conv3d(2, 2, 1).double()
    batch = Batch(clips(2))
    full, simple = (
        losses_of(
            NoiseConstraint(manner=manner),
            lambda x, t, cond: network(x),
            "v_prediction",
            ENDING,
            batch,
            last,
        ).total
        for manner in ("full", "simple")
    )

    assert ENDING.alpha[-1] == 0
    assert bool(full.isfinite())
    assert torch.equal(full, simple)


def test_at_t_0_the_level_below_is_the_clean_video():
    """The DDIM identity there: the step lands on x0_hat."""
    first = LINEAR.level(torch.tensor([0]))
    x_t, eps = clips(1), clips(1, seed=1)
    x0 = (x_t - first.sigma * eps) / first.alpha

    before = LINEAR.level_before(torch.tensor([0]))
    assert_close(
        coefficient(first, before) * (x0 - before.alpha / first.alpha * x_t), eps, absolute=1e-12
    )


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, SIGMOID], ids=["linear", "flow", "sigmoid"])
def test_the_coefficient_is_that_of_a_ddim_step_everywhere(schedule):
    t = torch.arange(999)
    level, before = schedule.level(t), schedule.level_before(t)
    x0, eps = torch.tensor(0.7).double(), torch.tensor(-1.3).double()
    x_t, x_s = (of.alpha * x0 + of.sigma * eps for of in (level, before))

    found = coefficient(level, before)
    assert bool((found < 0).all())
    assert_close(found * (x_s - before.alpha / level.alpha * x_t), eps.expand(999), absolute=1e-9)


def test_frames_that_change_evenly_cost_nothing():
    x0 = (torch.arange(5).double()[:, None, None] * clips(2)[:, :, :1]).expand(2, 2, 5, 3, 2)
    objective = term_alone(NoiseConstraint(), "epsilon", LINEAR, [100, 600], eps=0.5 * x0 + 1)

    assert objective(lambda x, t, cond: 3 * x - 1, Batch(x0), rng(2)).total.abs().item() < 1e-13


def test_the_gradient_goes_through_the_estimate_alone_also_where_x_t_has_one():
    p = a_pass(lambda x, t, cond: torch.sin(x), BATCH, "epsilon", LINEAR, rng(), t=T)
    assert p.x_t.requires_grad

    (found,) = torch.autograd.grad(NoiseConstraint()(p).sum(), p.x_t)
    x = p.x_t.detach().requires_grad_(True)
    (expected,) = torch.autograd.grad(by_hand(torch.sin(x), p.x_t.detach(), LINEAR, T).sum(), x)
    assert_close(found, expected, relative=1e-10, absolute=1e-14)


def test_its_gradient_is_the_same_beside_a_regularizer_that_differentiates_the_input():
    network, found = Wave(), []
    for others in ([], [StepVariation(weight=1e-300, step_size=1.0)]):
        losses = Objective(LINEAR, "epsilon", regularizers=[NoiseConstraint(weight=1e6), *others])(
            network, BATCH, rng()
        )
        found.append((losses.terms["noise_constraint"], gradients(losses, network)))

    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[1][1], found[0][1], relative=1e-12)


def test_of_a_learned_variance_the_predicted_half_alone_counts():
    plain = losses_of(NoiseConstraint(), Wave()).terms["noise_constraint"]
    learned = Objective(
        LINEAR,
        "epsilon",
        timesteps=term_alone(NoiseConstraint(), "epsilon", LINEAR, T).timesteps,
        variance=LearnedRange(),
        regularizers=[NoiseConstraint()],
    )
    network = Wave()

    terms = learned(lambda x, t, cond: torch.cat([network(x, t, cond), x], 1), BATCH, rng()).terms
    assert torch.equal(terms["noise_constraint"], plain)


def test_images_are_rejected():
    message = (
        r"^regularizer noise_constraint compares the frames of videos \[B, C, F, H, W\], but x0 "
        r"has the shape \[4, 2, 3, 2\]\. Write video data, or leave the regularizer out\.$"
    )
    with pytest.raises(InputError, match=message):
        losses_of(NoiseConstraint(), Wave(), batch=Batch(BATCH.x0[:, :, 0]))
    with pytest.raises(InputError, match=message):
        NoiseConstraint().check(LINEAR, (4, 2, 3, 2))


@pytest.mark.parametrize("frames", [1, 2])
def test_fewer_than_three_frames_are_rejected(frames):
    message = (
        r"^regularizer noise_constraint needs at least 3 frames, but the videos have "
        rf"{frames}\. Write num_frames: 3 or more\.$"
    )
    with pytest.raises(InputError, match=message):
        losses_of(NoiseConstraint(), Wave(), batch=Batch(clips(4, frames)))
    NoiseConstraint().check(LINEAR, (4, 2, 3, 3, 2))


def test_a_scale_is_rejected_where_nothing_is_scaled():
    message = (
        r"^regularizer noise_constraint: scale divides the x_t term, which manner: simple leaves "
        r"out\. Leave scale out, or write manner: full\.$"
    )
    with pytest.raises(InputError, match=message):
        NoiseConstraint(manner="simple", scale=500.0)


def test_the_second_difference_is_that_of_interior_frames():
    squares = (torch.arange(5.0) ** 2)[None, None, :, None, None].expand(1, 1, 5, 2, 2)

    assert torch.equal(second_difference(squares), torch.full((1, 1, 3, 2, 2), -2.0))


def test_the_published_settings_are_the_defaults():
    regularizer = NoiseConstraint()

    assert (regularizer.weight, regularizer.manner, regularizer.scale) == (0.2, "full", 1000.0)
    assert not any(
        (
            regularizer.differentiates_input,
            regularizer.needs_double_backward,
            regularizer.needs_full_precision,
        )
    )
