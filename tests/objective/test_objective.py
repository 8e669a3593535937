"""The objective: its products, what regularizers see, what it rejects, what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from helpers.support import PARAMETERIZATIONS, GivenPerturbation, assert_close, images, mixture, rng
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.registry import registered_name
from difftrain.core.rng import Rng
from difftrain.objective.losses import L1, Huber, PseudoHuber, Squared
from difftrain.objective.noise import InputPerturbation, Offset, White
from difftrain.objective.objective import Objective
from difftrain.objective.parameterization import Estimate
from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.timesteps import LogitNormal
from difftrain.objective.types import Batch, Timesteps
from difftrain.objective.variance import LearnedRange
from difftrain.objective.weightings import (
    P2,
    Debiased,
    MinSNR,
    SoftMinSNR,
    TruncatedSNR,
    Unit,
)

LINEAR = NoiseSchedule.linear()
BATCH = Batch(images(4))


class Recorder(WeightedTerm):
    """Calls `measure` on the pass and keeps the pass; the flags are the test's."""

    def __init__(self, measure=None, weight=1.0, every=1):
        super().__init__(weight, every)
        self.measure = measure or (lambda p: p.estimate.x0.flatten(1).mean(1))
        self.passes = []

    def forward(self, p):
        self.passes.append(p)
        return self.measure(p)


@pytest.fixture
def gradient_penalty():
    """A registered regularizer with a gradient of x0_hat by x_t; it leaves the registry after."""

    @REGULARIZERS.register("gradient_penalty_test")
    class GradientPenalty(WeightedTerm):
        """Squared norm of d (y x0_hat) / d x_t, y a keyed direction."""

        differentiates_input = needs_double_backward = True

        def forward(self, p):
            y = p.rng.normal(p.x_t.shape[1:], "direction").to(p.x_t)
            (gradient,) = torch.autograd.grad((p.estimate.x0 * y).sum(), p.x_t, create_graph=True)
            return gradient.square().flatten(1).sum(1)

    yield GradientPenalty
    del REGULARIZERS.constructors["gradient_penalty_test"]


def denoiser(x, t, cond):
    """Depends on the input, the time and, where there is one, the label."""
    label = expand_like(cond["label"], x) if "label" in cond else 0.0
    return 0.3 * x + torch.sin(2 * x) / 4 + expand_like(t / 1000, x) + label


def losses_of(objective, network=denoiser, batch=BATCH, step=0):
    return objective(network, batch, rng(len(batch.x0), step=step))


# The one formula


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("weighting", [Unit(), P2(0.5), Debiased(max_weight=2.0)], ids=repr)
def test_total_is_the_mean_of_weight_times_importance_times_error_once_each(kind, weighting):
    drawn = Timesteps(torch.tensor([0, 30, 500, 999]), torch.tensor([0.5, 2.0, 3.0, 0.1]).double())
    objective = Objective(LINEAR, kind, weighting, timesteps=lambda num, rng: drawn)
    level, eps = LINEAR.level(drawn.t), rng().normal((2, 3, 3), "noise").double()
    alpha, sigma = (expand_like(v, eps) for v in (level.alpha, level.sigma))
    p, q = (expand_like(v, eps) for v in mixture(kind, level))
    errors = (
        (denoiser(alpha * BATCH.x0 + sigma * eps, drawn.t, {}) - p * BATCH.x0 - q * eps)
        .square()
        .mean((1, 2, 3))
    )
    of_flow = (level.alpha / (level.alpha + level.sigma)) ** 2
    # |D eps|^2 / |D output|^2.
    ratio = {
        "epsilon": 1,
        "sample": level.snr,
        "v_prediction": level.alpha**2,
        "flow_prediction": of_flow,
    }
    weight = weighting(level) * (ratio[kind] if weighting.stated_for else 1)

    losses = losses_of(objective)

    assert_close(losses.errors, errors, relative=1e-12)
    assert_close(losses.total, (weight * drawn.importance * errors).mean(), relative=1e-10)
    assert_close(losses.log_snr, level.snr.log(), relative=1e-12, absolute=1e-12)


def test_terms_add_up_to_the_total_and_carry_no_gradient():
    network = nn.Conv2d(2, 2, 1).double()
    objective = Objective(
        LINEAR,
        "epsilon",
        regularizers=[Recorder(weight=0.3), Recorder(lambda p: p.estimate.eps.mean(), weight=2.0)],
    )

    losses = losses_of(objective, lambda x, t, cond: network(x))

    assert_close(sum(losses.terms.values()), losses.total, relative=1e-14)
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())
    assert not losses.errors.requires_grad


def test_noise_and_perturbation_are_different_streams_and_the_target_is_the_noise():
    seen = []
    objective = Objective(LINEAR, "epsilon", perturbation=InputPerturbation(0.5))
    losses_of(objective, lambda x, t, cond: seen.append((x, t)) or torch.zeros_like(x))
    ((x, t),) = seen
    level = LINEAR.level(t)
    eps = rng().normal((2, 3, 3), "noise").double()
    xi = rng().normal((2, 3, 3), "perturbation").double()

    assert_close(
        x,
        expand_like(level.alpha, x) * BATCH.x0 + expand_like(level.sigma, x) * (eps + 0.5 * xi),
        absolute=1e-14,
    )
    losses = losses_of(objective, lambda x, t, cond: torch.zeros_like(x))
    assert_close(losses.errors, eps.square().mean((1, 2, 3)), relative=1e-14)


@pytest.mark.parametrize("error", [Squared(), Huber(0.3), PseudoHuber(0.3), L1()], ids=repr)
def test_the_error_in_the_slot_compares_output_and_target(error):
    losses = losses_of(
        Objective(LINEAR, "epsilon", P2(1.0), error=error), lambda x, t, cond: torch.zeros_like(x)
    )

    assert_close(
        losses.errors,
        error(torch.zeros_like(BATCH.x0), rng().normal((2, 3, 3), "noise").double()),
        relative=1e-14,
    )


def test_flow_models_are_fed_a_thousand_sigma_and_diffusion_models_the_index():
    fed = {}
    for schedule in (LINEAR, NoiseSchedule.flow(1000, shift=3.0)):
        losses_of(
            Objective(schedule, "v_prediction"),
            lambda x, t, cond, kind=schedule.kind: fed.update({kind: t}) or x,
        )
    t = Objective(LINEAR, "v_prediction").timesteps(1000, rng()).t

    assert torch.equal(fed["diffusion"], t)
    assert_close(fed["flow"], 1000 * NoiseSchedule.flow(1000, shift=3.0).sigma[t], relative=1e-7)


def test_float32_and_bfloat16_outputs_give_a_float32_loss_near_the_float64_one():
    exact = losses_of(Objective(LINEAR, "v_prediction", P2(0.5))).total
    single = losses_of(
        Objective(LINEAR, "v_prediction", P2(0.5)), batch=Batch(BATCH.x0.float())
    ).total
    rounding = lambda x, t, cond: denoiser(x, t, cond).bfloat16()  # noqa: E731
    half = losses_of(
        Objective(LINEAR, "v_prediction", P2(0.5)), rounding, Batch(BATCH.x0.float())
    ).total

    assert single.dtype == half.dtype == torch.float32
    assert_close(single, exact, relative=1e-5)
    assert_close(half, exact, relative=0.02)  # outputs rounded to 3 digits


def test_learned_variance_is_scored_at_the_perturbed_input_with_importance():
    xi = images(4, seed=5)
    t = torch.tensor([0, 5, 400, 900])
    importance = torch.tensor([0.5, 2.0, 3.0, 0.1]).double()
    objective = Objective(
        LINEAR,
        "v_prediction",
        P2(1.0),
        lambda num, rng: Timesteps(t, importance),
        perturbation=GivenPerturbation(xi, 0.5),
        variance=LearnedRange(weight=0.01),
    )
    eps, level = rng().normal((2, 3, 3), "noise").double(), LINEAR.level(t)
    alpha, sigma = (expand_like(v, eps) for v in (level.alpha, level.sigma))
    x_t = alpha * BATCH.x0 + sigma * (eps + 0.5 * xi)

    losses = losses_of(objective, lambda x, t, cond: torch.cat([denoiser(x, t, {}), 0.1 * x], 1))

    x0_hat = alpha * x_t - sigma * denoiser(x_t, t, {})
    bound = LearnedRange(weight=0.01).bound(BATCH, t, x_t, Estimate(x0_hat, eps), 0.1 * x_t, LINEAR)
    assert_close(losses.terms["variational_bound"], (importance * bound).mean(), relative=1e-10)


def test_the_bound_leaves_the_prediction_to_the_error():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradients = []
    for weight in (0.0, 1.0):
        objective = Objective(LINEAR, "epsilon", variance=LearnedRange(weight=weight))
        total = losses_of(
            objective,
            lambda x, t, cond: torch.cat([scale * denoiser(x, t, {}), 0.1 * x.detach()], 1),
        ).total
        gradients += torch.autograd.grad(total, scale)

    assert_close(gradients[0], gradients[1], relative=1e-14)


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(zero_terminal_snr=True), NoiseSchedule.flow()],
    ids=["zero_terminal", "flow"],
)
@pytest.mark.parametrize(
    "weighting", [Unit(), P2(1.0), Debiased(), MinSNR(), SoftMinSNR(), TruncatedSNR()], ids=repr
)
def test_v_prediction_on_a_schedule_ending_at_snr_0_is_finite_with_finite_gradient(
    schedule, weighting
):
    network = nn.Conv2d(2, 2, 1).double()
    last = Timesteps(torch.tensor([0, 1, 998, 999]), torch.ones(4).double())
    objective = Objective(
        schedule,
        "v_prediction",
        weighting,
        timesteps=lambda num, rng: last,
        regularizers=[Recorder()],
    )

    losses = losses_of(objective, lambda x, t, cond: network(x))
    losses.total.backward()

    assert bool(losses.total.isfinite())
    assert bool(network.weight.grad.isfinite().all())


# Rejections


def rejection(*args, **parts):
    with pytest.raises(InputError) as error:
        Objective(*args, **parts)
    return str(error.value)


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(zero_terminal_snr=True), NoiseSchedule.flow()],
    ids=["zero_terminal", "flow"],
)
def test_epsilon_on_a_schedule_ending_at_snr_0_is_rejected(schedule):
    assert rejection(schedule, "epsilon") == (
        "parameterization epsilon says nothing about x0 where SNR = 0, and this schedule ends "
        "there. Write parameterization: v_prediction (flow_prediction on a flow schedule), or a "
        "schedule without zero terminal SNR."
    )


def test_a_weighting_that_diverges_is_rejected_when_the_objective_is_built():
    to_the_image = NoiseSchedule(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]), {})
    assert rejection(to_the_image, "sample", Debiased()) == (
        "weighting 'debiased' on the sample error grows without bound where SNR = infinity (t = 0 "
        "of this schedule). Use a schedule with noise at every timestep, parameterization: "
        "v_prediction, or weighting: {type: min_snr}."
    )


@pytest.mark.parametrize("error", [L1(), Huber(), PseudoHuber()], ids=repr)
def test_a_converted_weighting_is_rejected_unless_the_error_is_squared(error):
    assert rejection(LINEAR, "v_prediction", P2(), error=error) == (
        "weighting 'p2' is stated for the epsilon error. It converts to v_prediction for the "
        f"squared error alone, and this error is {registered_name(error)!r}. "
        "Write error: {type: squared}, weighting: {type: unit}, or parameterization: epsilon."
    )


def test_other_errors_are_accepted_where_nothing_needs_to_convert():
    Objective(LINEAR, "epsilon", P2(), error=L1())
    Objective(LINEAR, "v_prediction", Unit(), error=L1())
    # Trains epsilon's error.
    Objective(
        LINEAR,
        "v_prediction",
        P2(),
        error=L1(),
        perturbation=InputPerturbation(target="implied_eps"),
    )


def test_implied_eps_with_a_learned_variance_is_rejected():
    assert rejection(
        LINEAR,
        "v_prediction",
        perturbation=InputPerturbation(target="implied_eps"),
        variance=LearnedRange(),
    ) == (
        "perturbation target implied_eps is not defined with a learned variance. Write target: "
        "clean, or variance: {type: fixed}."
    )


def test_a_network_with_the_wrong_number_of_channels_is_rejected_with_a_remedy():
    with pytest.raises(
        InputError,
        match=r"^the model returns 4 channels .* but 2.*Write variance: \{type: learned_range\}\.$",
    ):
        losses_of(Objective(LINEAR, "epsilon"), lambda x, t, cond: torch.cat([x, x], 1))
    with pytest.raises(
        InputError,
        match=r"^the model returns 2 channels .* but 4 .* Write variance: \{type: fixed\}\.$",
    ):
        losses_of(Objective(LINEAR, "epsilon", variance=LearnedRange()), lambda x, t, cond: x)


# Regularizers


class Plain(nn.Module):
    """A regularizer without base class, which lacks some members."""

    weight, every, warmup = 1.0, 1, 0
    differentiates_input = needs_double_backward = False

    def forward(self, p):
        return p.x_t.mean()


class Full(Plain):
    """A regularizer without base class that has all members."""

    needs_full_precision = False

    def check(self, schedule, shape):
        pass


class NoModule:
    """All members, but no state that a checkpoint could save."""

    weight, every, warmup = 1.0, 1, 0
    differentiates_input = needs_double_backward = needs_full_precision = False
    check = __call__ = None


@pytest.mark.parametrize(
    ("regularizer", "lacks"),
    [(Plain(), "has no needs_full_precision, no check"), (NoModule(), "is not a torch.nn.Module")],
    ids=["members", "module"],
)
def test_an_incomplete_regularizer_is_rejected_with_the_base_class_to_use(regularizer, lacks):
    name = type(regularizer).__name__
    assert rejection(LINEAR, "epsilon", regularizers=[regularizer]) == (
        f"regularizer {name} {lacks}. Derive the class {name} from "
        "difftrain.objective.regularizers.WeightedTerm, which has defaults for all members but "
        "forward."
    )


def test_a_regularizer_with_all_members_needs_no_base_class():
    objective = Objective(LINEAR, "epsilon", regularizers=[Full()])

    assert list(losses_of(objective).terms) == ["error", "Full"]


def test_the_base_class_alone_is_checked_and_inactive_where_nothing_is_asked_of_it():
    @REGULARIZERS.register("base_class_test")
    class Own(WeightedTerm):
        """Own: ``0``."""

    try:
        block = {"type": "base_class_test", "weight": 2, "every": 3, "warmup": 4}
        own = REGULARIZERS.parse(block, "regularizer").build()
        assert (own.weight, own.every, own.warmup) == (2.0, 3, 4)
        assert REGULARIZERS.parse("base_class_test", "regularizer").dump() == {
            "type": "base_class_test",
            "weight": 1.0,
            "every": 1,
            "warmup": 0,
        }
        with pytest.raises(InputError, match=r"^base_class_test\.every: expected .* 1, got 0\.$"):
            Own(every=0)
        assert not own.differentiates_input
        assert not own.needs_double_backward
        assert not own.needs_full_precision
        own.check(LINEAR, (4, 2, 3, 3))
        with pytest.raises(NotImplementedError, match=r"^Own defines no forward$"):
            losses_of(Objective(LINEAR, "epsilon", regularizers=[own]))
    finally:
        del REGULARIZERS.constructors["base_class_test"]


def test_used_regularizers_are_those_with_a_weight_and_active_ones_those_of_the_step():
    always = Recorder(weight=0.5)
    third = Recorder(weight=2.0, every=3)
    third.warmup = 6
    objective = Objective(LINEAR, "epsilon", regularizers=[always, Recorder(weight=0.0), third])

    assert objective.used_regularizers() == {"Recorder": always, "Recorder_3": third}
    assert objective.active_regularizers(1) == [("Recorder", 0.5, always)]
    assert objective.active_regularizers(3) == [
        ("Recorder", 0.5, always),
        ("Recorder_3", 2.0 * 3 * 4 / 6, third),
    ]


def test_the_objective_is_importable_from_its_package():
    import difftrain.objective

    assert difftrain.objective.Objective is Objective
    with pytest.raises(AttributeError, match="has no attribute 'Subjective'"):
        difftrain.objective.Subjective  # noqa: B018


def test_a_regularizer_changes_neither_draws_nor_the_base_term(gradient_penalty):
    parts = dict(
        weighting=P2(0.5),
        timesteps=LogitNormal(),
        noise=Offset(0.1),
        perturbation=InputPerturbation(0.2),
    )
    plain = losses_of(Objective(LINEAR, "epsilon", **parts))
    regularized = losses_of(
        Objective(
            LINEAR, "epsilon", **parts, regularizers=[gradient_penalty(weight=0.5), Recorder()]
        )
    )

    assert torch.equal(regularized.terms["error"], plain.terms["error"])
    assert torch.equal(regularized.errors, plain.errors)
    assert regularized.total != plain.total


def test_the_pass_holds_what_the_loss_was_computed_from():
    recorder, seen = Recorder(), []
    objective = Objective(
        LINEAR, "v_prediction", perturbation=InputPerturbation(0.2), regularizers=[recorder]
    )
    losses_of(
        objective, lambda x, t, cond: seen.append((x, t, denoiser(x, t, cond))) or seen[-1][2]
    )
    (x, t, output), (p,) = seen[0], recorder.passes
    alpha, sigma = (expand_like(v, x) for v in (p.level.alpha, p.level.sigma))

    assert p.batch is BATCH
    assert p.schedule is LINEAR
    assert torch.equal(p.x_t, x)
    assert torch.equal(p.t, t)
    assert torch.equal(p.level.alpha, LINEAR.alpha[t])
    assert_close(p.eps, rng().normal((2, 3, 3), "noise"))
    assert_close(p.estimate.x0, alpha * x - sigma * output, absolute=1e-14)
    assert_close(p.estimate.eps, sigma * x + alpha * output, absolute=1e-14)


def test_each_regularizer_draws_from_streams_of_its_own_name():
    recorders = [Recorder(), Recorder(weight=0.0), Recorder()]
    losses_of(Objective(LINEAR, "epsilon", regularizers=recorders))
    draws = [r.passes[0].rng.normal((3,), "direction") for r in (recorders[0], recorders[2])]

    assert torch.equal(draws[0], rng().normal((3,), "regularizers.Recorder.direction"))
    assert torch.equal(draws[1], rng().normal((3,), "regularizers.Recorder_3.direction"))


def test_a_term_has_its_registered_name_and_the_second_one_a_number(
    gradient_penalty,
):
    parts = [gradient_penalty(), Recorder(), gradient_penalty(weight=0.0), gradient_penalty()]
    objective = Objective(LINEAR, "epsilon", variance=LearnedRange(), regularizers=parts)
    terms = losses_of(objective, lambda x, t, cond: torch.cat([denoiser(x, t, cond), x], 1)).terms

    assert list(terms) == [
        "error",
        "variational_bound",
        "gradient_penalty_test",
        "Recorder",
        "gradient_penalty_test_3",
    ]


@pytest.mark.parametrize("name", ["error", "variational_bound"])
def test_a_regularizer_with_the_name_of_an_own_term_does_not_replace_it(name):
    terms = losses_of(
        Objective(LINEAR, "epsilon", regularizers=[type(name, (Recorder,), {})(weight=0.5)])
    ).terms

    assert list(terms) == ["error", f"{name}_2"]


def test_values_by_sample_are_averaged_with_importance_and_batch_statistics_are_not():
    importance = torch.tensor([0.5, 2.0, 3.0, 0.1]).double()
    by_sample = Recorder(lambda p: p.x_t.square().mean((1, 2, 3)), 0.5)
    statistic = Recorder(lambda p: p.x_t.square().mean(), 0.25)
    objective = Objective(
        LINEAR,
        "epsilon",
        timesteps=lambda num, rng: Timesteps(torch.tensor([0, 30, 500, 999]), importance),
        regularizers=[by_sample, statistic],
    )
    _, first, second = losses_of(objective).terms.values()
    squares = by_sample.passes[0].x_t.square().mean((1, 2, 3))

    assert_close(first, 0.5 * (importance * squares).mean(), relative=1e-14)
    assert_close(second, 0.25 * squares.mean(), relative=1e-14)


def test_every_k_steps_the_weight_counts_k_times():
    always, third = Recorder(weight=0.5), Recorder(weight=0.5, every=3)
    objective = Objective(LINEAR, "epsilon", regularizers=[always, third])
    terms = [losses_of(objective, step=step).terms for step in range(7)]

    assert [len(third.passes), len(always.passes)] == [3, 7]
    assert ["Recorder_2" in of_step for of_step in terms] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    for step in (0, 3, 6):
        assert_close(terms[step]["Recorder_2"], 3 * terms[step]["Recorder"], relative=1e-14)


@pytest.mark.parametrize(("warmup", "every"), [(0, 1), (1, 1), (5, 1), (5, 2)])
def test_a_warmup_raises_the_weight_linearly_from_its_first_part_to_all_of_it(warmup, every):
    recorder = Recorder(lambda p: p.x_t.new_ones(()), weight=0.5, every=every)
    recorder.warmup = warmup
    objective = Objective(LINEAR, "epsilon", regularizers=[recorder])

    for step in range(7):
        found = losses_of(objective, step=step).terms.get("Recorder")
        expected = 0.5 * every * min(1, (step + 1) / max(1, warmup))
        assert found == (expected if step % every == 0 else None)


def test_a_recorded_value_is_a_measure_without_gradient_and_no_part_of_the_loss():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def measure(p):
        p.record("size", p.estimate.eps.square().mean())
        return p.estimate.eps.mean()

    losses = losses_of(
        Objective(LINEAR, "epsilon", regularizers=[Recorder(measure), Recorder(measure)]),
        lambda x, t, cond: scale * x,
    )

    assert list(losses.measures) == ["Recorder.size", "Recorder_2.size"]
    assert_close(losses.measures["Recorder.size"], losses.measures["Recorder_2.size"])
    assert not any(value.requires_grad for value in losses.measures.values())
    assert_close(losses.total, sum(losses.terms.values()), relative=1e-14)
    assert losses_of(Objective(LINEAR, "epsilon")).measures == {}


def test_the_pass_takes_means_as_the_objective_does():
    importance, recorder = torch.tensor([0.5, 2.0, 3.0, 0.1]).double(), Recorder()
    drawn = Timesteps(torch.tensor([0, 30, 500, 999]), importance)
    losses = losses_of(
        Objective(LINEAR, "epsilon", timesteps=lambda num, rng: drawn, regularizers=[recorder])
    )
    p, values = recorder.passes[0], torch.arange(4.0).double()

    assert_close(p.mean(values), (importance * values).mean(), relative=1e-14)
    assert_close(losses.terms["Recorder"], p.mean(p.estimate.x0.flatten(1).mean(1)), relative=1e-14)


def test_a_regularizer_of_weight_zero_is_never_called():
    recorder = Recorder(weight=0.0)
    assert list(losses_of(Objective(LINEAR, "epsilon", regularizers=[recorder])).terms) == ["error"]
    assert recorder.passes == []


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_to_the_input_are_tracked_only_for_regularizers_that_are_evaluated(weight):
    differentiating, recorder = Recorder(weight=weight), Recorder()
    differentiating.differentiates_input = True
    losses_of(Objective(LINEAR, "epsilon", regularizers=[differentiating, recorder]))

    assert recorder.passes[0].x_t.requires_grad == (weight > 0)


def test_gradient_penalty_equals_its_closed_form_and_trains_the_network(gradient_penalty):
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([10, 100, 500, 800])

    def total(*regularizers):
        fixed = Timesteps(t, torch.ones(4).double())
        objective = Objective(
            LINEAR, "epsilon", timesteps=lambda num, rng: fixed, regularizers=list(regularizers)
        )
        return losses_of(objective, lambda x, t, cond: scale * x).total

    penalty = total(gradient_penalty(0.1)) - total()
    level = LINEAR.level(t)
    y = (
        rng()
        .normal((2, 3, 3), "regularizers.gradient_penalty_test.direction")
        .double()
        .square()
        .sum((1, 2, 3))
    )

    # x0_hat = (1 - sigma scale) x / alpha
    slope = (1 - level.sigma * 0.4) / level.alpha
    assert_close(penalty, 0.1 * (slope**2 * y).mean(), relative=1e-12)
    (gradient,) = torch.autograd.grad(penalty, scale)
    assert_close(
        gradient, 0.1 * (-2 * slope * level.sigma / level.alpha * y).mean(), relative=1e-12
    )


def test_a_pass_without_gradient_evaluates_regularizers_that_need_none():
    recorder = Recorder()
    recorder.differentiates_input = True
    with torch.no_grad():
        losses = losses_of(Objective(LINEAR, "epsilon", regularizers=[recorder]))

    assert "Recorder" in losses.terms
    assert not losses.total.requires_grad


def test_buffers_of_regularizers_are_the_objectives_only_state():
    recorder = Recorder()
    recorder.register_buffer("mean_variation", torch.ones(()))
    objective = Objective(LINEAR, "epsilon", regularizers=[recorder])

    assert list(objective.state_dict()) == ["regularizers.Recorder.mean_variation"]
    assert list(objective.parameters()) == []


def with_state(value, kind=None):
    """Return a regularizer with one buffer, of a class with the given name."""
    regularizer = type(kind or "Recorder", (Recorder,), {})()
    regularizer.register_buffer("mean", torch.tensor(value))
    return regularizer


def means_of(objective):
    return {name.split(".")[1]: value.item() for name, value in objective.state_dict().items()}


@pytest.mark.parametrize(
    ("saved", "wanted", "expected"),
    [
        (["A", "B"], ["A", "B"], {"A": 1.0, "B": 2.0}),
        (["A", "B"], ["B", "A"], {"B": 2.0, "A": 1.0}),
        (["A", "B"], ["B"], {"B": 2.0}),
        (["A"], ["C", "A"], {"C": -1.0, "A": 1.0}),
        ([], ["A"], {"A": -1.0}),
        (["A"], [], {}),
    ],
    ids=["same", "reordered", "one removed", "one added", "first added", "last removed"],
)
def test_each_regularizer_finds_its_own_state_and_a_new_one_keeps_its_initial_one(
    saved, wanted, expected
):
    state = Objective(
        LINEAR,
        "epsilon",
        regularizers=[with_state(float(i + 1), kind) for i, kind in enumerate(saved)],
    ).state_dict()
    objective = Objective(
        LINEAR, "epsilon", regularizers=[with_state(-1.0, kind) for kind in wanted]
    )

    objective.load_state_dict(state)

    assert means_of(objective) == expected


def test_a_regularizer_with_a_state_of_other_buffers_is_rejected():
    state = Objective(LINEAR, "epsilon", regularizers=[with_state(1.0)]).state_dict()
    other = Recorder()
    other.register_buffer("variance", torch.tensor(0.0))

    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*Recorder\.variance.*Unexpected key.*Recorder\.mean"
    ):
        Objective(LINEAR, "epsilon", regularizers=[other]).load_state_dict(state)


# predict


def test_predict_repeats_the_pass_with_its_conditions():
    recorder = Recorder()
    losses_of(
        Objective(LINEAR, "v_prediction", regularizers=[recorder]),
        batch=Batch(BATCH.x0, {"label": torch.arange(4.0).double()}),
    )
    (p,) = recorder.passes

    assert torch.equal(p.predict(p.x_t, p.t).x0, p.estimate.x0)
    assert torch.equal(p.predict(p.x_t, p.t).eps, p.estimate.eps)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0])], ids=["slice", "indices"])
def test_predict_of_rows_uses_the_conditions_of_those_rows(rows):
    recorder = Recorder()
    losses_of(
        Objective(LINEAR, "v_prediction", regularizers=[recorder]),
        batch=Batch(BATCH.x0, {"label": torch.arange(4.0).double()}),
    )
    (p,) = recorder.passes

    assert_close(p.predict(p.x_t[rows], p.t[rows], rows).x0, p.estimate.x0[rows], absolute=1e-15)


def test_predict_takes_the_level_of_the_time_that_it_is_given():
    recorder = Recorder()
    losses_of(Objective(LINEAR, "v_prediction", regularizers=[recorder]))
    p, t = recorder.passes[0], torch.tensor([1, 2, 3, 4])
    alpha, sigma = (expand_like(v, p.x_t) for v in (LINEAR.alpha[t], LINEAR.sigma[t]))

    assert_close(
        p.predict(p.x_t, t).x0, alpha * p.x_t - sigma * denoiser(p.x_t, t, {}), absolute=1e-14
    )


def test_predict_drops_the_variance_channels():
    recorder = Recorder()
    objective = Objective(LINEAR, "epsilon", variance=LearnedRange(), regularizers=[recorder])
    losses_of(objective, lambda x, t, cond: torch.cat([denoiser(x, t, cond), x], 1))
    (p,) = recorder.passes

    assert torch.equal(p.predict(p.x_t, p.t).eps, p.estimate.eps)


def test_dropout_is_the_same_in_predict_as_in_the_pass_and_differs_at_the_next_step():
    recorder, seen = Recorder(), []
    objective = Objective(LINEAR, "epsilon", regularizers=[recorder])
    for step in (0, 1, 0):
        losses_of(
            objective,
            lambda x, t, cond: seen.append(F.dropout(torch.ones_like(x))) or seen[-1] * x,
            step=step,
        )
    p = recorder.passes[0]

    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert 0 < (seen[0] == 0).double().mean() < 1
    assert torch.equal(p.predict(p.x_t, p.t).eps, p.estimate.eps)


# What it leaves untouched


def test_a_forward_leaves_torchs_global_generator_as_it_was(gradient_penalty):
    objective = Objective(
        LINEAR,
        "epsilon",
        timesteps=LogitNormal(),
        noise=Offset(),
        perturbation=InputPerturbation(),
        regularizers=[gradient_penalty(), Recorder()],
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()

    losses_of(objective, lambda x, t, cond: F.dropout(denoiser(x, t, cond)))

    assert torch.equal(torch.get_rng_state(), before)


def test_losses_do_not_depend_on_the_global_seed():
    totals = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        totals.append(
            losses_of(
                Objective(LINEAR, "epsilon"), lambda x, t, cond: F.dropout(denoiser(x, t, cond))
            ).total
        )

    assert torch.equal(*totals)


def test_a_forward_does_not_change_the_batch():
    x0, label = BATCH.x0.clone(), torch.arange(4.0).double()
    losses_of(
        Objective(LINEAR, "epsilon", perturbation=InputPerturbation(0.3)),
        batch=Batch(x0, {"label": label}),
    )

    assert torch.equal(x0, BATCH.x0)
    assert torch.equal(label, torch.arange(4.0).double())


def test_a_video_is_treated_like_an_image_with_frames():
    flat = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    video = flat.reshape(2, 3, 4, 2, 3)

    def noise(x0, rng):
        return White()(flat, rng).reshape(x0.shape)

    for kind in PARAMETERIZATIONS:
        losses = [
            Objective(LINEAR, kind, P2(0.5), noise=noise)(denoiser, Batch(x0), Rng(0, 0, range(2)))
            for x0 in (flat, video)
        ]
        assert_close(losses[0].total, losses[1].total, relative=1e-14)


# Double backward through attention


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )


def penalized(unet, regularizer):
    """Return objective, denoiser and batch in float32, which every attention kernel can take."""
    return (
        Objective(LINEAR, "epsilon", regularizers=[regularizer]),
        lambda x, t, cond: unet(x, t).sample,
        Batch(images(2, 2, 8).float()),
    )


def test_double_backward_through_attention_works_in_the_objectives_context(unet, gradient_penalty):
    objective, network, batch = penalized(unet, gradient_penalty())

    unet.zero_grad()
    with objective.context():
        objective(network, batch, rng(2)).total.backward()

    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    assert len(gradients) > 50
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_double_backward_through_attention_fails_without_the_context(unet, gradient_penalty):
    objective, network, batch = penalized(unet, gradient_penalty())

    with pytest.raises(
        RuntimeError, match=r"derivative for aten::_scaled_dot_product.*is not implemented"
    ):
        objective(network, batch, rng(2)).total.backward()


def test_the_context_changes_kernels_only_for_regularizers_that_count(gradient_penalty):
    def only_math(*regularizers):
        with Objective(LINEAR, "epsilon", regularizers=list(regularizers)).context():
            return not torch.backends.cuda.flash_sdp_enabled()

    assert only_math(Recorder(), gradient_penalty())
    assert not only_math(gradient_penalty(weight=0.0))
    assert not only_math(Recorder())
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("differentiates", "weight", "kept"),
    [(True, 1.0, True), (False, 1.0, False), (True, 0.0, False)],
)
def test_the_context_keeps_compiled_graphs_only_for_regularizers_that_differentiate_the_input(
    differentiates, weight, kept
):
    import torch._functorch.config as compiler

    recorder, before = Recorder(weight=weight), compiler.donated_buffer
    recorder.differentiates_input = differentiates
    with Objective(LINEAR, "epsilon", regularizers=[recorder]).context():
        assert compiler.donated_buffer == (before and not kept)
    assert compiler.donated_buffer == before
