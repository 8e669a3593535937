"""Step variation against explicit Jacobians and Gaussian data, and its two methods compared."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from helpers.support import (
    PARAMETERIZATIONS,
    Gaussian,
    Onlooker,
    a_pass,
    assert_close,
    gradients,
    images,
    level_at,
    relative_distance,
    rng,
    term_alone,
)
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import StepVariation
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.types import Batch

LINEAR = NoiseSchedule.linear()
FLOW = NoiseSchedule.flow()
COSINE = NoiseSchedule.cosine()
CASES = [(LINEAR, kind) for kind in PARAMETERIZATIONS] + [
    (FLOW, kind) for kind in PARAMETERIZATIONS if kind != "epsilon"
]
cases = pytest.mark.parametrize(
    ("schedule", "kind"), CASES, ids=lambda v: v.kind if isinstance(v, NoiseSchedule) else v
)
methods = pytest.mark.parametrize("method", ["finite_difference", "double_backward"])
T, BATCH = torch.tensor([5, 300, 700, 990]), Batch(images(4))
DIM = 18


class Tanh(nn.Module):
    """tanh(W x + t / 1000), smooth and with a curvature; passes are counted."""

    def __init__(self, dim=DIM, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(
            torch.randn(dim, dim, generator=generator, dtype=torch.float64).to(dtype)
            / math.sqrt(dim)
        )
        self.calls = 0

    def forward(self, x, t, cond):
        self.calls += 1
        return torch.tanh(x.flatten(1) @ self.weight.T + t[:, None] / 1000).reshape(x.shape)


class Dropping(Tanh):
    def forward(self, x, t, cond):
        return F.dropout(super().forward(x, t, cond), 0.5)


def y(num=4, step=0, shape=(2, 3, 3)):
    """Return the output directions; the regularizer scales them in float32."""
    draws = rng(num, step=step).normal(shape, "regularizers.step_variation.direction")
    return (draws / math.sqrt(math.prod(shape))).double()


def losses_of(
    regularizer, network, kind="epsilon", schedule=LINEAR, batch=BATCH, step=0, t=T, importance=None
):
    objective = term_alone(regularizer, kind, schedule, t, importance=importance)
    with objective.context():
        return objective(network, batch, rng(len(batch.x0), step=step))


def x0_of(kind, output, x, alpha, sigma):
    """Return the x0 that the output implies, independently of the library."""
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    return (x - sigma * output) / (alpha + sigma)


def r_by_jacobian(network, kind, schedule, step=0):
    """Return |J^T (sigma y)| of every sample, J = d x0_hat / d eps, with a graph to the weights."""
    eps = rng(step=step).normal((2, 3, 3), "noise").double()
    level = schedule.level(T)
    found = []
    for i in range(4):
        alpha, sigma = level.alpha[i], level.sigma[i]

        def x0_hat(e, i=i, alpha=alpha, sigma=sigma):
            x = alpha * BATCH.x0[i : i + 1] + sigma * e[None]
            output = network(x, schedule.model_time(T[i : i + 1]), {})
            return x0_of(kind, output, x, alpha, sigma)[0]

        jacobian = torch.autograd.functional.jacobian(x0_hat, eps[i], create_graph=True)
        direction = sigma * y(step=step)[i].flatten()
        found.append((jacobian.reshape(DIM, DIM).T @ direction).norm())
    return torch.stack(found)


@pytest.mark.parametrize("importance", [None, [0.5, 2.0, 3.0, 0.1]], ids=["plain", "importance"])
@pytest.mark.parametrize("decay", [0.99, 0.3])
@pytest.mark.parametrize(
    ("options", "error"),
    [({"method": "double_backward"}, 1e-11), ({"central": True, "step_size": 1e-4}, 1e-6)],
    ids=["double_backward", "central"],
)
@cases
def test_value_mean_and_gradient_are_those_of_the_formula_with_an_explicit_jacobian(
    schedule, kind, options, error, decay, importance
):
    """Over two steps, with m = m + rate (mean(r) - m) in the graph of the penalty (r - m)^2."""
    network, regularizer = Tanh(), StepVariation(decay=decay, **options)
    weight = torch.tensor(importance or [1.0] * 4, dtype=torch.float64)
    mean = torch.zeros((), dtype=torch.float64)
    for step in range(2):
        losses = losses_of(regularizer, network, kind, schedule, step=step, importance=weight)
        r = r_by_jacobian(network, kind, schedule, step)
        mean = mean.detach() + (1 - decay) * ((weight * r).mean() - mean.detach())
        penalty = (weight * (r - mean) ** 2).mean()

        assert_close(losses.total, penalty, relative=1e-11)
        assert_close(regularizer.mean_variation, mean, relative=1e-12)
        assert_close(losses.measures["step_variation.mean_variation"], mean, relative=1e-12)
        expected = torch.autograd.grad(penalty, network.weight)[0].flatten()
        assert relative_distance(gradients(losses, network), expected) <= error


@cases
def test_variation_of_the_optimal_denoiser_of_gaussian_data(schedule, kind):
    """x0_hat is linear: r = sigma^2 slope |y|, with the slope Cov(x0, x) / Var(x)."""
    data = Gaussian()
    shape = (1, 2, 4)
    regularizer = StepVariation(measured_batches=1)
    batch, t = data.batch(4), T
    level = schedule.level(t)
    r = level.sigma**2 * data.slope("sample", level) * y(shape=shape).flatten(1).norm(dim=1)

    losses = losses_of(regularizer, data.denoiser(kind, schedule), kind, schedule, batch)

    # The x0_hat of epsilon divides by alpha = 0.006.
    assert_close(regularizer.mean_variation, r.mean(), relative=1e-9)
    assert_close(losses.total, (r - r.mean()).square().mean(), relative=1e-8)


def test_variation_of_gaussian_data_has_the_mean_and_the_square_that_its_directions_have():
    """|y| sqrt(dim) is chi-distributed: E r and E r^2 have closed forms at one level."""
    data = Gaussian()
    num = 4000
    dim = 8
    regularizer, t = StepVariation(measured_batches=1), torch.full((num,), 600)
    level = LINEAR.level(t[:1])
    scale = (level.sigma**2 * data.slope("sample", level)).item()
    log_ratio = math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)
    of_chi = math.sqrt(2) * math.exp(log_ratio) / math.sqrt(dim)

    losses = losses_of(
        regularizer,
        data.denoiser("v_prediction", LINEAR),
        "v_prediction",
        batch=data.batch(num),
        t=t,
    )

    variance = 1 - of_chi**2
    assert_close(regularizer.mean_variation / scale, of_chi, absolute=4 * math.sqrt(variance / num))
    square = (regularizer.mean_variation**2 + losses.total.detach()) / scale**2
    assert_close(square, 1.0, absolute=4 * math.sqrt(2 / dim / num))  # |y|^2 has variance 2 / dim


# The finite difference


@pytest.fixture(scope="module")
def unet():
    """Return diffusers' UNet with attention: the methods differ by rounding and curvature alone."""
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
            dropout=0.1,
        )


class Wrapped(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, cond):
        return self.unet(x, t).sample


OF_UNET = [
    (NoiseSchedule.scaled_linear(), "epsilon"),
    (COSINE, "v_prediction"),
    (FLOW, "flow_prediction"),
    (LINEAR, "sample"),
]


@pytest.mark.parametrize(
    ("schedule", "kind"), OF_UNET, ids=lambda v: v if isinstance(v, str) else "on"
)
@pytest.mark.parametrize(
    ("dtype", "options", "error"),
    [
        (torch.float32, {}, 1e-2),
        (torch.float32, {"central": True}, 2e-3),
        (torch.float64, {}, 1e-5),
        (torch.float64, {"central": True}, 1e-8),
    ],
    ids=["one-sided float32", "central float32", "one-sided float64", "central float64"],
)
def test_the_calibrated_difference_has_the_gradient_of_the_double_backward(
    unet, schedule, kind, dtype, options, error
):
    """Dropout is on.

    A difference errs by curvature times h and by rounding over h. At the best h that is about
    rounding^(1/2) for a one-sided and rounding^(2/3) for a central difference: 3e-4 and 2e-5 in
    float32, 1e-8 and 4e-11 in float64. A deep network errs more: the bounds leave a factor of 30.
    """
    network = Wrapped(copy.deepcopy(unet).to(dtype).train())
    batch = Batch(images(4, 2, 8).to(dtype))
    of = {}
    for name, regularizer in (
        ("difference", StepVariation(**options)),
        ("exact", StepVariation(method="double_backward")),
    ):
        losses = losses_of(regularizer, network, kind, schedule, batch)
        of[name] = losses.total.detach(), gradients(losses, network)

    # The methods use different attention kernels.
    rounding = 1e-4 if dtype == torch.float32 else 1e-12
    assert_close(of["difference"][0], of["exact"][0], relative=rounding)
    assert relative_distance(of["difference"][1], of["exact"][1]) <= error


def test_the_difference_has_an_error_of_the_order_of_its_step_and_of_its_square_if_central():
    network = Tanh()
    exact = gradients(losses_of(StepVariation(method="double_backward"), network), network)

    def error(**options):
        return relative_distance(
            gradients(losses_of(StepVariation(**options), network), network), exact
        )

    one_sided = error(step_size=1e-3) / error(step_size=1e-4)
    central = error(step_size=1e-2, central=True) / error(step_size=1e-3, central=True)
    assert one_sided == pytest.approx(10, rel=0.05)
    assert central == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("central", [False, True])
def test_the_step_is_found_once_the_same_each_time_and_kept_with_the_state(central):
    network = Tanh()
    first = StepVariation(central=central)
    again = StepVariation(central=central)
    found = [gradients(losses_of(r, network), network) for r in (first, again)]
    assert first.h.item() == again.h.item() > 0
    assert torch.equal(*found)

    h, third = first.h.clone(), StepVariation(central=central)
    third.load_state_dict(first.state_dict())
    later = []
    for regularizer in (first, third):
        network.calls = 0
        losses = losses_of(regularizer, network, step=1)
        mean = regularizer.mean_variation.clone()
        later.append((losses.total.detach(), gradients(losses, network), mean))
        assert network.calls == (3 if central else 2)  # the pass, one ahead, one back: no search
        assert torch.equal(regularizer.h, h)
    for one, other in zip(*later, strict=True):
        assert torch.equal(one, other)


def test_a_given_step_is_used_without_a_search():
    network, given = Tanh(), StepVariation(step_size=0.01)
    losses_of(given, network)

    assert network.calls == 2
    assert given.h.item() == 0


def test_a_recipe_that_changes_between_a_given_and_a_calibrated_step_wins_over_the_state():
    network, found = Tanh(), StepVariation()
    losses_of(found, network)
    given, expected = StepVariation(step_size=0.5), StepVariation(step_size=0.5)
    given.load_state_dict(found.state_dict())
    expected.mean_variation.copy_(found.mean_variation)
    assert torch.equal(
        *(gradients(losses_of(r, network, step=1), network) for r in (given, expected))
    )

    again, never_given = StepVariation(), StepVariation()
    losses_of(given, network)
    again.load_state_dict(StepVariation(step_size=0.5).state_dict())
    losses_of(again, network, step=1)
    losses_of(never_given, network, step=1)
    assert again.h.item() == never_given.h.item() > 0


def test_a_pass_that_is_not_finite_calibrates_no_step():
    network, regularizer, expected = Tanh(), StepVariation(), StepVariation()
    whole = network.weight.data.clone()
    network.weight.data[0, 0] = math.nan
    assert not losses_of(regularizer, network).total.isfinite()
    assert regularizer.h.item() == 0

    network.weight.data.copy_(whole)
    losses_of(regularizer, network)
    losses_of(expected, network)
    assert regularizer.h.item() == expected.h.item() > 0


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_network_has_a_step_and_the_exact_gradient(dtype, central):
    """It has no curvature to agree upon: all of a difference is rounding."""
    network = nn.Linear(DIM, DIM, bias=False, dtype=dtype)

    def linear(x, t, cond):
        return network(x.flatten(1)).reshape(x.shape)

    batch = Batch(BATCH.x0.to(dtype))
    found = [
        gradients(losses_of(r, linear, batch=batch), network)
        for r in (StepVariation(central=central), StepVariation(method="double_backward"))
    ]

    assert relative_distance(*found) <= (2e-3 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_that_is_linear_but_for_rounding_has_a_step_and_nearly_the_exact_gradient(
    dtype, central
):
    """Its gradients with respect to x differ by rounding alone, which no two steps share."""
    network = nn.Linear(DIM, DIM, bias=False, dtype=dtype)

    def detour(x, t, cond):
        return torch.sinh(torch.asinh(network(x.flatten(1)))).reshape(x.shape)

    batch = Batch(BATCH.x0.to(dtype))
    found = [
        gradients(losses_of(r, detour, batch=batch), network)
        for r in (StepVariation(central=central), StepVariation(method="double_backward"))
    ]

    assert relative_distance(*found) <= (2e-3 if dtype == torch.float32 else 1e-7)


class Rounding(Tanh):
    """Twelve layers in bfloat16, for inputs of every dtype."""

    def forward(self, x, t, cond):
        hidden = x.bfloat16().flatten(1)
        for _ in range(12):
            hidden = torch.tanh(2 * hidden @ self.weight.T.bfloat16())
        return hidden.reshape(x.shape).to(x)


class Rough(Tanh):
    """Kinks closer together than any step."""

    def forward(self, x, t, cond):
        return super().forward(torch.sin(1e4 * x) / 3e3, t, cond)


@pytest.mark.parametrize(
    ("network", "central"), [(Rounding, False), (Rounding, True), (Rough, True)]
)
def test_a_network_of_rounding_or_kinks_is_rejected_with_a_remedy(network, central):
    message = (
        r"^regularizer step_variation: the finite difference does not settle\. At its best step of "
        r".* it differs by .* % from the difference at half the step: "
        r"the network computes with too few digits, or is not smooth\. "
        r"Write model: \{dtype: float32\}, or method: double_backward\.$"
    )
    with pytest.raises(InputError, match=message):
        losses_of(
            StepVariation(central=central),
            network(dtype=torch.float32),
            batch=Batch(BATCH.x0.float()),
        )


@pytest.mark.parametrize("central", [False, True])
def test_under_autocast_the_gradient_of_the_difference_is_that_of_float32(unet, central):
    """Both of its passes leave autocast; the objective's own pass does not."""
    network, batch = Wrapped(unet), Batch(images(4, 2, 8).float())
    found = []
    for enabled in (False, True):
        objective = term_alone(StepVariation(central=central), "v_prediction", COSINE, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = objective(network, batch, rng())
        found.append((losses.total.detach(), gradients(losses, network), losses.errors))

    assert_close(found[1][0], found[0][0], relative=1e-6)
    assert relative_distance(found[1][1], found[0][1]) <= 1e-6
    assert not torch.equal(found[1][2], found[0][2])  # autocast was on


@methods
def test_a_network_whose_estimate_does_not_move_has_no_variation_and_finite_gradients(method):
    network = Tanh()
    nn.init.zeros_(network.weight)
    losses = losses_of(StepVariation(method=method), network, "sample")

    assert losses.total.item() == 0
    assert bool(gradients(losses, network).isfinite().all())


@methods
def test_a_network_that_does_not_look_at_its_input_has_no_variation(method):
    shown = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    regularizer = StepVariation(method=method)

    def blind(x, t, cond):
        return shown.weight.reshape(1, 2, 3, 3).expand_as(x)

    losses = losses_of(regularizer, blind, "sample")

    assert losses.total.item() == regularizer.mean_variation.item() == 0
    assert bool((gradients(losses, shown) == 0).all())


@methods
def test_one_sample_that_does_not_move_leaves_the_others_gradient(method):
    network, regularizer = Tanh(), StepVariation(method=method)
    network.weight.data[:9] = 0

    def still(x, t, cond):
        return network(x, t, cond) * (torch.arange(4.0) > 0).double()[:, None, None, None]

    losses = losses_of(regularizer, still, "sample")

    assert bool(gradients(losses, network).isfinite().all())
    assert gradients(losses_of(regularizer, still, "sample"), network).norm() > 0


@methods
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_dropout_is_the_same_in_every_pass(kind, method):
    """A second mask would be a difference that does not shrink with h."""
    network = Dropping()
    options = {"central": True, "step_size": 1e-4} if method == "finite_difference" else {}
    found = gradients(losses_of(StepVariation(method=method, **options), network, kind), network)
    p = a_pass(network, BATCH, kind, LINEAR, rng(), t=T)
    r = r_with_graph(p)
    penalty = (r - 0.01 * r.mean()).square().mean()

    expected = torch.autograd.grad(penalty, network.weight)[0].flatten()
    assert relative_distance(found, expected) <= 1e-6


def r_with_graph(p):
    sigma = expand_like(p.level.sigma, p.x_t)
    (slope,) = torch.autograd.grad((sigma * y() * p.estimate.x0).sum(), p.x_t, create_graph=True)
    return (sigma * slope).flatten(1).norm(dim=1)


@methods
def test_without_gradients_the_value_is_right_and_nothing_is_updated(method):
    network, regularizer = Tanh(), StepVariation(method=method)
    losses_of(regularizer, network)
    before = {name: value.clone() for name, value in regularizer.state_dict().items()}

    with torch.no_grad():
        losses = losses_of(regularizer, network, step=1)

    r = r_by_jacobian(network, "epsilon", LINEAR, step=1)
    assert_close(losses.total, (r - before["mean_variation"]).square().mean(), relative=1e-11)
    assert not losses.total.requires_grad
    for name, value in regularizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@methods
def test_without_gradients_under_inference_before_any_step_the_mean_is_its_start(method):
    network, regularizer = Tanh(), StepVariation(method=method)
    with torch.no_grad():
        losses = losses_of(regularizer, network)

    assert_close(
        losses.total, r_by_jacobian(network, "epsilon", LINEAR).square().mean(), relative=1e-11
    )


# The running mean


def means_of(regularizer, num):
    network = Tanh()
    found = []
    alone = []
    for step in range(num):
        losses_of(regularizer, network, step=step)
        found.append(regularizer.mean_variation.clone())
        alone.append(r_by_jacobian(network, "epsilon", LINEAR, step).mean().detach())
    return torch.stack(found), torch.stack(alone)


def test_the_first_batches_are_averaged_plainly_if_so_many_are_measured():
    found, alone = means_of(StepVariation(measured_batches=3, decay=0.9), 5)

    plain = alone[:3].cumsum(0) / torch.arange(1, 4)
    fourth = plain[2] + 0.1 * (alone[3] - plain[2])
    assert_close(
        found, torch.stack([*plain, fourth, fourth + 0.1 * (alone[4] - fourth)]), relative=1e-11
    )


def test_from_its_published_start_the_mean_needs_229_updates_to_90_percent_and_458_to_99():
    p = a_pass(Tanh(), BATCH, "epsilon", LINEAR, rng(), t=T)
    regularizer = StepVariation(method="double_backward")
    means = []
    for _ in range(458):
        regularizer(p)  # the same pass: r is the same
        means.append(regularizer.mean_variation.item())

    lasting = StepVariation(method="double_backward", decay=0.0)
    lasting(p)
    assert_close(means[228] / lasting.mean_variation, 0.90, absolute=5e-4)
    assert_close(means[457] / lasting.mean_variation, 0.99, absolute=5e-5)


def test_two_micro_batches_update_the_mean_twice_as_published():
    network = Tanh()
    regularizer = StepVariation(decay=0.9)
    mean = 0.0
    for rows in ([0, 1], [2, 3]):
        objective = term_alone(regularizer, "epsilon", LINEAR, T[rows])
        objective(network, Batch(BATCH.x0[rows]), Rng(0, 0, rows, batch_size=4))
        mean += 0.1 * (r_by_jacobian(network, "epsilon", LINEAR)[rows].mean().item() - mean)

    assert_close(regularizer.mean_variation, mean, relative=1e-11)
    assert regularizer.num_updates.item() == 2


def test_the_published_settings_are_the_defaults():
    regularizer = StepVariation()

    assert (regularizer.weight, regularizer.decay, regularizer.measured_batches) == (1.0, 0.99, 0)
    assert regularizer.mean_variation.item() == 0


# Flags, and what the network may be


def test_it_asks_for_a_second_derivative_only_where_it_takes_one():
    difference, exact = StepVariation(), StepVariation(method="double_backward")

    assert (
        difference.differentiates_input,
        difference.needs_double_backward,
        difference.needs_full_precision,
    ) == (True, False, True)
    assert (
        exact.differentiates_input,
        exact.needs_double_backward,
        exact.needs_full_precision,
    ) == (True, True, False)


@pytest.mark.parametrize("options", [{"central": True}, {"step_size": 0.1}])
def test_options_of_the_difference_are_rejected_with_the_double_backward(options):
    with pytest.raises(
        InputError,
        match=r"^regularizer step_variation: central and step_size are options of method: "
        r"finite_difference, but this is method: double_backward\. Leave them out, or write "
        r"method: finite_difference\.$",
    ):
        StepVariation(method="double_backward", **options)


@methods
def test_gradient_checkpointing_changes_no_gradient(unet, method):
    batch, found = Batch(images(4, 2, 8).float()), []
    for checkpointing in (False, True):
        network = Wrapped(copy.deepcopy(unet).train())
        if checkpointing:
            network.unet.enable_gradient_checkpointing()
        objective = term_alone(StepVariation(method=method), "epsilon", LINEAR, T)
        with (
            objective.context()
        ):  # the backward belongs in it: that is where activations are computed again
            found.append(gradients(objective(network, batch, rng()), network))

    assert relative_distance(found[1], found[0]) <= 1e-6


class Compilable(nn.Module):
    """Two layers, whose backward needs what lies between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Tanh().weight, nn.Parameter(0.5 * Tanh().weight.detach().T)

    def forward(self, x, t, cond):
        return (torch.exp(torch.tanh(x.flatten(1) @ self.first)) @ self.second).reshape(x.shape)


@pytest.fixture
def compiled():
    """A network and torch.compile's of it, with a backend that needs no compiler."""
    torch._dynamo.reset()
    network = Compilable()
    yield network, torch.compile(network, backend="aot_eager")
    torch._dynamo.reset()


def test_a_compiled_network_has_the_same_gradient_in_the_objectives_context(compiled):
    """Also after a step of plain backward passes, for which torch.compile frees activations."""
    network, found = compiled[0], []
    for of in compiled:
        for regularizer in (Onlooker(), StepVariation(central=True, step_size=1e-3)):
            objective = term_alone(regularizer, "epsilon", LINEAR, T)
            with objective.context():
                found.append(gradients(objective(of, BATCH, rng()), network))

    assert relative_distance(found[3], found[1]) <= 1e-12


def test_a_compiled_network_needs_that_context(compiled):
    """Where torch no longer raises this, the context has become idle."""
    network, of = compiled
    gradients(term_alone(Onlooker(), "epsilon", LINEAR, T)(of, BATCH, rng()), network)

    with pytest.raises(RuntimeError, match="donated_buffer=False"):
        term_alone(StepVariation(central=True, step_size=1e-3), "epsilon", LINEAR, T)(
            of, BATCH, rng()
        )


def test_the_base_term_is_the_same_with_it_and_without(unet):
    """Gradients to the input are tracked, nothing else."""
    network, batch = Wrapped(unet), Batch(images(4, 2, 8).float())
    plain, regularized = (
        Objective(LINEAR, "epsilon", regularizers=r)(network, batch, rng())
        for r in ([], [StepVariation()])
    )

    assert torch.equal(plain.errors, regularized.errors)
    assert torch.equal(plain.total, regularized.terms["error"])


def test_time_is_that_of_the_pass_on_flow_schedules_too():
    """A network that depends on time: a different time in the second pass changes the function."""
    network = nn.Linear(1, 1, dtype=torch.float64)

    def timed(x, time, cond):
        return expand_like(level_at(FLOW, time).sigma, x) * network.weight[0, 0] * torch.sin(x)

    found = [
        gradients(losses_of(r, timed, "flow_prediction", FLOW), network)
        for r in (
            StepVariation(central=True, step_size=1e-4),
            StepVariation(method="double_backward"),
        )
    ]
    assert relative_distance(*found) <= 1e-6
