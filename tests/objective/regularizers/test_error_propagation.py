"""Error propagation: the roll-out against loops and exact Gaussians, the statistic by pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.support import (
    PARAMETERIZATIONS,
    Gaussian,
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
from difftrain.objective.mmd import BANDWIDTHS, mmd
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import ErrorPropagation
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.types import Batch

LINEAR = NoiseSchedule.linear()
FLOW = NoiseSchedule.flow()
SIGMOID = NoiseSchedule.sigmoid()
NAME = "regularizers.error_propagation"


class Fixed(ErrorPropagation):
    """Uses the given head and number of steps."""

    def __init__(self, head, steps, **options):
        super().__init__(**options)
        self.given = head, steps

    def draw(self, p):
        return self.given


class Net(nn.Module):
    """Depends on the input, the time and the label, with dropout."""

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter((torch.randn(18, 18, generator=generator) / 6).to(dtype))
        self.dropout = dropout

    def forward(self, x, t, cond):
        label = expand_like(cond["label"], x) if "label" in cond else 0.0
        hidden = x.flatten(1) @ self.weight.T
        return F.dropout(
            torch.sin(hidden.reshape(x.shape).to(x) + expand_like(t / 500, x) + label), self.dropout
        )


def labelled(num=8, dtype=torch.float64):
    return Batch(images(num).to(dtype), {"label": 0.3 * torch.arange(num).to(dtype)})


def coefficients(schedule, t):
    """Return (alpha, sigma) at t and at the level below, as plain numbers."""
    at_t = schedule.alpha[t].item(), schedule.sigma[t].item()
    if t == 0:
        return *at_t, 1.0, 0.0
    return *at_t, schedule.alpha[t - 1].item(), schedule.sigma[t - 1].item()


def one_step(kind, x, x0, eps, schedule, t, noise):
    """Return a step by the formulas of DDPM (equations 6 and 7), DDIM (eta 0), or Euler."""
    a, s, a_s, s_s = coefficients(schedule, t)
    if kind == "ancestral":
        beta = 1 - (a / a_s) ** 2
        mean = a_s * beta / s**2 * x0 + (a / a_s) * s_s**2 / s**2 * x
        return mean + math.sqrt(beta * s_s**2 / s**2) * noise
    if kind == "ddim":
        return a_s * x0 + s_s * eps
    return x + (s_s - s) * (eps - x0)


def by_hand(network, batch, head, steps, step="ancestral", truncate=None, schedule=LINEAR, seed=0):
    """Return (rolled, noised) [num / 2, D] of a v_prediction network: a plain loop over steps."""
    num = len(batch.x0)
    draws = Rng(seed, 0, range(num))
    even = list(range(0, num, 2))
    odd = list(range(1, num, 2))
    noise = draws.normal((2, 3, 3), f"{NAME}.noise").to(batch.x0)
    a, s, *_ = coefficients(schedule, head)
    x = a * batch.x0[even] + s * noise[even]
    for k in range(steps):
        t = head - k
        cond = {name: value[even] for name, value in batch.cond.items()}
        a, s, *_ = coefficients(schedule, t)
        time = schedule.model_time(torch.full((len(even),), t))
        output = network(x, time, cond)
        total = a**2 + s**2
        x0, eps = (a * x - s * output) / total, (s * x + a * output) / total
        fresh = Rng(seed, 0, even).normal((2, 3, 3), f"{NAME}.step {k}").to(x)
        x = one_step(step, x, x0, eps, schedule, t, fresh)
        if truncate is not None and k < steps - truncate:
            x = x.detach()
    a, s = schedule.alpha[head - steps].item(), schedule.sigma[head - steps].item()
    return x.flatten(1), (a * batch.x0[odd] + s * noise[odd]).flatten(1)


def pairwise(x, y):
    """Return (V, U) from all pairs; the bandwidth is a constant."""
    both = torch.cat([x, y])
    squares = (both[:, None] - both[None]).square().sum(-1)
    n = len(both)
    bandwidth = (squares.sum() / (n * n - n)).detach()
    kernel = sum(torch.exp(-squares / (bandwidth * width)) for width in (0.25, 0.5, 1.0, 2.0, 4.0))
    xx = kernel[: len(x), : len(x)]
    yy = kernel[len(x) :, len(x) :]
    xy = kernel[: len(x), len(x) :]

    def off(block):
        return (block.sum() - block.diagonal().sum()) / (len(block) * (len(block) - 1))

    return xx.mean() + yy.mean() - 2 * xy.mean(), off(xx) + off(yy) - 2 * xy.mean()


def losses_of(regularizer, network, batch, schedule=LINEAR, kind="v_prediction"):
    objective = term_alone(regularizer, kind, schedule)
    # Fixed has no name of its own.
    objective.regularizers = nn.ModuleDict({"error_propagation": regularizer})
    return objective(network, batch, rng(len(batch.x0)))


# The statistic


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 3), (4, 9)])
def test_both_statistics_and_the_gradient_are_those_of_all_pairs(n, m):
    draws = torch.randn(
        n + m, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_(True)
    (v, u), (expected_v, expected_u) = (
        statistic(draws[:n], draws[n:] + 0.5) for statistic in (mmd, pairwise)
    )

    assert_close(v, expected_v, relative=1e-12, absolute=1e-14)
    assert_close(u, expected_u, relative=1e-12, absolute=1e-14)
    assert_close(
        *(torch.autograd.grad(value, draws)[0] for value in (v, expected_v)),
        relative=1e-10,
        absolute=1e-14,
    )
    assert not u.requires_grad


def test_in_float64_very_far_from_zero_nothing_cancels():
    """Squares of 1e14 with distances of 10: the sum of squares alone would keep no digit."""
    draws = (
        torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    )
    draws.requires_grad_(True)
    values = mmd(draws[:5], draws[5:])[0], pairwise(draws[:5], draws[5:])[0]

    assert_close(values[0], values[1], relative=1e-8)
    assert_close(
        *(torch.autograd.grad(value, draws)[0] for value in values), relative=1e-6, absolute=1e-10
    )


def test_in_float32_far_from_zero_it_is_as_exact_as_in_float64():
    """A Gram matrix in float32 would leave nothing: squares of 1e6 with distances of 10."""
    draws = (torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) + 1000).requires_grad_(
        True
    )
    wide = draws.detach().double().requires_grad_(True)
    values = mmd(draws[:5], draws[5:])[0], pairwise(wide[:5], wide[5:])[0]

    assert values[0].dtype == torch.float32
    assert_close(values[0], values[1], relative=1e-7)
    assert_close(
        *(torch.autograd.grad(value, x)[0] for value, x in zip(values, (draws, wide), strict=True)),
        relative=1e-5,
        absolute=1e-8,
    )


def test_equal_samples_give_zero_and_no_nan():
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    v, u = mmd(same[:2], same[2:])

    assert v.item() == u.item() == 0
    assert bool(torch.autograd.grad(v, same)[0].isfinite().all())


def test_the_unbiased_statistic_of_one_distribution_is_0_on_average_and_the_biased_one_is_not():
    draws = torch.randn(400, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, u = (
        torch.stack(values)
        for values in zip(*(mmd(both[:8], both[8:]) for both in draws), strict=True)
    )

    assert abs(u.mean() / (u.std() / 20)) <= 4
    assert v.min() > 0
    assert v.mean() / (v.std() / 20) > 50


def test_the_unbiased_statistic_grows_with_the_distance_of_two_distributions():
    draws = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [
        mmd(draws[:20], draws[20:] + shift)[1].item() for shift in (0.0, 0.5, 1.0, 2.0, 100.0)
    ]

    assert values == sorted(values)
    assert values[-1] < 10


# The roll-out


CASES = [
    ("ancestral", LINEAR),
    ("ancestral", SIGMOID),
    ("ddim", LINEAR),
    ("ddim", FLOW),
    ("flow_euler", FLOW),
]
of_steps = pytest.mark.parametrize(
    ("step", "schedule"), CASES, ids=lambda v: v if isinstance(v, str) else v.kind
)


@of_steps
@pytest.mark.parametrize(("head", "steps"), [(600, 4), (3, 3), (999, 1)])
def test_term_statistic_and_full_gradient_are_those_of_a_loop_by_hand(step, schedule, head, steps):
    network, batch = Net(), labelled()
    losses = losses_of(Fixed(head, steps, step=step), network, batch, schedule)
    v, u = pairwise(*by_hand(network, batch, head, steps, step, schedule=schedule))

    assert_close(losses.total, v, relative=1e-10)
    assert_close(losses.measures["error_propagation.u_statistic"], u, relative=1e-9)
    assert (
        relative_distance(
            gradients(losses, network), torch.autograd.grad(v, network.weight)[0].flatten()
        )
        <= 1e-10
    )


@pytest.mark.parametrize("truncate", [1, 2, 3, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_truncated_gradients_go_through_the_last_steps_alone(truncate, checkpointing):
    network, batch = Net(), labelled()
    found = gradients(
        losses_of(Fixed(700, 4, truncate=truncate, checkpointing=checkpointing), network, batch),
        network,
    )
    of_all, cut = (
        torch.autograd.grad(
            pairwise(*by_hand(network, batch, 700, 4, truncate=k))[0], network.weight
        )[0].flatten()
        for k in (None, truncate)
    )

    assert relative_distance(found, cut) <= 1e-11
    assert (relative_distance(found, of_all) < 1e-11) == (truncate == 4)  # of 4 steps


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("step", ["ancestral", "ddim"])
def test_checkpointing_changes_no_bit_also_with_dropout_and_autocast(step, autocast):
    network = Net(0.3, torch.float32)
    batch = labelled(dtype=torch.float32)
    found = []
    for checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = losses_of(
                Fixed(500, 3, step=step, checkpointing=checkpointing), network, batch
            )
        found.append((losses.total.detach(), gradients(losses, network)))

    assert found[0][1].norm() > 0
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


def test_checkpointing_computes_each_step_but_the_last_again_in_the_backward():
    calls = []

    class Counted(Net):
        def forward(self, x, t, cond):
            calls.append(t[0].item())
            return super().forward(x, t, cond)

    network = Counted()
    losses = losses_of(Fixed(500, 3, checkpointing=True), network, labelled())
    forward = list(calls)
    losses.total.backward()

    assert forward[1:] == [500, 499, 498]
    assert calls[4:] == [499, 500]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_gradients_the_value_is_the_same(checkpointing):
    network = Net()
    batch = labelled()
    regularizer = Fixed(500, 3, checkpointing=checkpointing)
    with_gradient = losses_of(regularizer, network, batch)
    with torch.no_grad():
        without = losses_of(regularizer, network, batch)

    assert torch.equal(without.total, with_gradient.total)
    assert not without.total.requires_grad


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize(
    ("step", "schedule"), [CASES[0], *CASES[2:]], ids=lambda v: v if isinstance(v, str) else v.kind
)
def test_rolled_samples_of_the_optimal_denoiser_are_the_gaussians_of_an_exact_recursion(
    step, schedule, kind
):
    """x0_hat and eps_hat are linear in x, so every step takes a Gaussian to a known Gaussian."""
    if schedule is FLOW and kind == "epsilon":
        pytest.skip("not defined at its end")
    data = Gaussian()
    num = 4000
    head = 500
    steps = 5
    p = a_pass(data.denoiser(kind, schedule), data.batch(num), kind, schedule, rng(num))
    rolled = Fixed(head, steps, step=step)

    a, s, *_ = coefficients(schedule, head)
    rows = list(range(0, num, 2))
    start = a * p.batch.x0[rows] + s * rng(num).normal((1, 2, 4), "any").double()[rows]
    found = rolled.roll_out(p, start, rows, head, steps).flatten()

    mean, variance = a * data.mean, a**2 * data.std**2 + s**2
    for t in range(head, head - steps, -1):
        level = schedule.level(torch.tensor([t]))
        a = schedule.alpha[t].item()
        k0, ke = data.slope("sample", level).item(), data.slope("epsilon", level).item()
        away = mean - a * data.mean
        at_mean = one_step(step, mean, data.mean + k0 * away, ke * away, schedule, t, 0.0)
        slope = one_step(step, 1.0, k0, ke, schedule, t, 0.0)
        spread = one_step(step, 0.0, 0.0, 0.0, schedule, t, 1.0)
        mean, variance = at_mean, slope**2 * variance + spread**2
    assert_close(found.mean(), mean, absolute=4 * math.sqrt(variance / len(found)))
    assert_close(found.var(), variance, absolute=4 * variance * math.sqrt(2 / len(found)))
    one_level = data.input_variance(schedule.level(torch.tensor([head - steps]))).item()
    assert abs(variance / one_level - 1) < 0.02  # and nearly those of the data noised to that level


def test_a_denoiser_that_is_not_optimal_is_seen():
    """On twenty coarse levels a few steps go far; discretization matters less than the error."""
    data = Gaussian()
    found = {}
    schedule = NoiseSchedule.cosine(20)
    for name, network in (
        ("optimal", data.denoiser("v_prediction", schedule)),
        ("bad", lambda x, t, cond: -x),
    ):
        objective = term_alone(ErrorPropagation(), "v_prediction", schedule)
        losses = [
            objective(network, data.batch(32, seed), Rng(seed, 0, range(32))) for seed in range(25)
        ]
        found[name] = torch.stack(
            [each.measures["error_propagation.u_statistic"] for each in losses]
        )

    difference = found["bad"] - found["optimal"]
    assert difference.mean() / (difference.std() / 5) > 4
    assert abs(found["optimal"].mean()) < found["bad"].mean() / 2


# Draws and rows


def a_pass_of(samples, step=0, seed=0, num_timesteps=1000):
    x0 = images(len(samples))
    return a_pass(
        lambda x, t, cond: 0.1 * x,
        Batch(x0),
        "epsilon",
        NoiseSchedule.linear(num_timesteps),
        Rng(seed, step, samples, 64),
    )


def test_head_and_length_are_those_of_the_step_for_all_processes_and_micro_batches():
    regularizer = ErrorPropagation()
    of_parts = [
        [regularizer.draw(a_pass_of(samples, step)) for step in range(20)]
        for samples in ([0, 1], [2, 3], [40, 41, 42, 43])
    ]

    assert of_parts[0] == of_parts[1] == of_parts[2]
    assert len(set(of_parts[0])) > 15
    assert of_parts[0] != [regularizer.draw(a_pass_of([0, 1], step, seed=1)) for step in range(20)]


def test_head_and_length_are_uniform_and_steps_end_at_the_first_level():
    num = 4
    length = 2
    draws = 3000
    p, regularizer = a_pass_of([0, 1, 2, 3], num_timesteps=num), ErrorPropagation(length=length)
    counts: dict = {}
    for step in range(draws):
        p.rng.step = step
        pair = regularizer.draw(p)
        counts[pair] = counts.get(pair, 0) + 1

    expected = {(1, 1): 1 / 3, (2, 1): 1 / 6, (2, 2): 1 / 6, (3, 1): 1 / 6, (3, 2): 1 / 6}
    assert counts.keys() == expected.keys()
    for pair, probability in expected.items():
        assert abs(counts[pair] / draws - probability) <= 4 * math.sqrt(
            probability * (1 - probability) / draws
        )


@pytest.mark.parametrize("samples", [[4, 5, 6, 7], [5, 6, 7, 8], [3, 1, 0, 2]])
def test_even_places_of_the_global_batch_are_rolled_and_odd_ones_are_noised(samples):
    regularizer, p = Fixed(300, 2), a_pass_of(samples)
    seen = {}

    def statistics(rolled, noised):
        seen.update(rolled=rolled, noised=noised)
        return rolled.sum(), noised.sum()

    regularizer.statistics = statistics
    regularizer(p)

    noise = Rng(0, 0, samples).normal((2, 3, 3), "regularizers.Onlooker.noise").double()
    even, odd = ([i for i, place in enumerate(samples) if place % 2 == half] for half in (0, 1))
    assert len(seen["rolled"]) == len(even) == 2
    assert_close(
        seen["noised"],
        (LINEAR.alpha[298] * p.batch.x0[odd] + LINEAR.sigma[298] * noise[odd]).flatten(1),
        absolute=1e-14,
    )
    x = LINEAR.alpha[300] * p.batch.x0[even] + LINEAR.sigma[300] * noise[even]
    for k, t in enumerate((300, 299)):
        draws = Rng(0, 0, [samples[i] for i in even])
        fresh = draws.normal((2, 3, 3), f"regularizers.Onlooker.step {k}").double()
        eps = 0.1 * x
        x0 = (x - LINEAR.sigma[t] * eps) / LINEAR.alpha[t]
        x = one_step("ancestral", x, x0, eps, LINEAR, t, fresh)
    assert_close(seen["rolled"], x.flatten(1), absolute=1e-12)


def test_rows_are_rolled_with_their_own_conditions():
    seen = []

    def network(x, t, cond):
        seen.append(cond["label"].tolist())
        return 0.1 * x

    batch = Batch(images(6), {"label": torch.arange(6)})
    losses_of(Fixed(300, 2), network, batch)

    assert seen == [[0, 1, 2, 3, 4, 5], [0, 2, 4], [0, 2, 4]]


def test_noise_of_a_step_is_fresh_and_that_of_ddim_is_none():
    draws = []

    class Noting(Rng):
        def child(self, prefix):
            return self

        def of(self, rows):
            if len(rows) == len(self.samples):
                return self
            return Noting(self.seed, self.step, [self.samples[row] for row in rows])

        def normal(self, shape, stream):
            draws.append((stream, tuple(self.samples)))
            return super().normal(shape, stream)

    for step in ("ancestral", "ddim"):
        p = a_pass(Net(), labelled(4), "v_prediction", LINEAR, Noting(0, 0, range(4)))
        del draws[:]
        Fixed(300, 3, step=step)(p)
        of_steps = [(f"step {k}", (0, 2)) for k in range(3)] if step == "ancestral" else []
        assert draws == [("noise", (0, 1, 2, 3)), *of_steps]


def test_dropout_drops_the_same_in_every_step_and_in_the_pass():
    """The masks of all passes of a step have one key: fewer rows get its first numbers."""
    masks = []

    def network(x, t, cond):
        masks.append(F.dropout(torch.ones_like(x)))
        return 0.1 * masks[-1] * x

    losses_of(Fixed(300, 2), network, labelled(4))

    assert torch.equal(masks[1], masks[2])
    assert 0 < (masks[1] == 0).double().mean() < 1


# Rejections and defaults


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_micro_batch_without_two_in_each_half_is_rejected(num):
    message = (
        r"^regularizer error_propagation compares the halves of a micro-batch, which need at least "
        rf"2 samples each, but the micro-batch has {num}\. "
        r"Write training: \{micro_batch_size: 4\} or more\.$"
    )
    with pytest.raises(InputError, match=message):
        losses_of(ErrorPropagation(), Net(), labelled(num))
    ErrorPropagation().check(LINEAR, (4, 1, 2, 2))


def test_places_that_are_nearly_all_even_are_rejected():
    message = (
        r"^regularizer error_propagation compares the samples at even and at odd places of the "
        r"batch and needs at least 2 of each, but 3 of the places \[0, 2, 4, 5\] are even\. "
        r"Give Rng consecutive samples\.$"
    )
    with pytest.raises(InputError, match=message):
        ErrorPropagation()(a_pass_of([0, 2, 4, 5]))


def test_an_euler_step_is_rejected_on_a_schedule_that_is_no_flow():
    message = (
        r"^regularizer error_propagation: step: flow_euler needs a flow schedule\. "
        r"Write step: ancestral, or step: ddim\.$"
    )
    with pytest.raises(InputError, match=message):
        losses_of(ErrorPropagation(step="flow_euler"), Net(), labelled(4))
    ErrorPropagation(step="flow_euler").check(FLOW, (4, 1, 2, 2))


def test_a_schedule_of_one_level_is_rejected():
    of_one = NoiseSchedule(torch.tensor([0.5]), torch.tensor([0.5]), {})
    message = (
        r"^regularizer error_propagation needs a schedule of at least 2 timesteps, but .* 1\. "
    )
    with pytest.raises(InputError, match=message):
        ErrorPropagation().check(of_one, (4, 1, 2, 2))


def test_a_truncation_that_truncates_nothing_is_rejected():
    message = (
        r"^regularizer error_propagation: truncate 5 keeps all of the at most 5 steps\. "
        r"Write a smaller number, or leave truncate out\.$"
    )
    with pytest.raises(InputError, match=message):
        ErrorPropagation(truncate=5)
    ErrorPropagation(truncate=5, length=6)


def test_an_odd_batch_has_halves_that_differ_by_one():
    losses = losses_of(Fixed(300, 2), Net(), labelled(7))

    assert_close(losses.total, pairwise(*by_hand(Net(), labelled(7), 300, 2))[0], relative=1e-10)


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.linear(zero_terminal_snr=True), FLOW], ids=["zero_terminal", "flow"]
)
@pytest.mark.parametrize("step", ["ancestral", "ddim"])
def test_from_where_snr_is_0_the_roll_out_is_finite(schedule, step):
    network = Net()
    losses = losses_of(Fixed(999, 5, step=step), network, labelled(4), schedule)

    assert bool(losses.total.isfinite())
    assert bool(gradients(losses, network).isfinite().all())


def test_the_published_settings_are_the_defaults():
    regularizer = ErrorPropagation()

    assert (regularizer.weight, regularizer.length, regularizer.step, regularizer.truncate) == (
        1.0,
        5,
        "ancestral",
        None,
    )
    assert BANDWIDTHS == (0.25, 0.5, 1.0, 2.0, 4.0)
    assert not any(
        (
            regularizer.differentiates_input,
            regularizer.needs_double_backward,
            regularizer.needs_full_precision,
        )
    )
    assert list(regularizer.state_dict()) == []


def test_a_statistic_of_the_batch_is_not_multiplied_by_importance():
    """It is no mean over samples that importance could correct."""
    batch, found = labelled(), []
    for importance in (torch.ones(8).double(), torch.linspace(0.1, 3, 8).double()):
        objective = term_alone(
            ErrorPropagation(), "epsilon", LINEAR, torch.full((8,), 10), importance=importance
        )
        found.append(objective(Net(), batch, rng(8)).total)

    assert torch.equal(*found)


def test_the_base_term_is_the_same_with_it_and_without():
    plain, regularized = (
        Objective(LINEAR, "epsilon", regularizers=r)(Net(0.3), labelled(), rng(8))
        for r in ([], [ErrorPropagation()])
    )

    assert torch.equal(plain.total, regularized.terms["error"])


def test_the_network_is_fed_the_time_of_each_step():
    times = []

    def network(x, time, cond):
        times.append(level_at(FLOW, time).sigma[0].item())
        return 0.1 * x

    losses_of(Fixed(300, 3, step="flow_euler"), network, labelled(4), FLOW)

    assert times[1:] == FLOW.sigma[[300, 299, 298]].tolist()
