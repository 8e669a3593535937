"""Generation against Gaussian data with a known denoiser; noise that belongs to the index."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.generation import (
    COSINE,
    CPU,
    DATA,
    DIFFUSION_KINDS,
    FLOW,
    LINEAR,
    ZERO_TERMINAL,
    Optimal,
    generated,
    generator,
)
from helpers.support import Gaussian, assert_close
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.generation.generator import (
    SampleGenerator,
    blocks,
    conditioned,
    generate,
    guided,
)
from difftrain.generation.samplers import DDIM, DDPM, DPMSolver, Euler, FlowEuler, UniPC
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.parameterization import Estimate, estimate
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.transitions import ddim, flow_euler
from difftrain.objective.types import Cond
from difftrain.objective.variance import LearnedRange

# The data's mean and standard deviation


@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(steps=250),
        DPMSolver(steps=100),
        DPMSolver(steps=100, order=3),
        UniPC(steps=100),
        Euler(steps=250),
    ],
    ids=lambda sampler: f"{sampler.registered_as[1]}{getattr(sampler, 'order', '')}",
)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_a_deterministic_sampler_gives_the_datas_mean_and_spread(sampler, kind, schedule):
    """64 x 256 numbers: the mean's standard error is 0.002.

    The last step jumps to x0_hat, which costs a percent or two of the spread.
    """
    x = generated(sampler, schedule, kind)

    assert_close(x.mean(), DATA.mean, absolute=4 * DATA.std / math.sqrt(x.numel()))
    assert_close(x.std(), DATA.std, relative=0.04)


@pytest.mark.parametrize(
    "schedule", [LINEAR, COSINE, ZERO_TERMINAL], ids=["linear", "cosine", "zero terminal"]
)
@pytest.mark.parametrize(
    "sampler",
    [DDIM(steps=20), DDIM(steps=20, eta=1.0), DPMSolver(), UniPC(), Euler(), DDPM(steps=20)],
)
def test_every_parameterization_of_one_denoiser_gives_the_same_images(sampler, schedule):
    """They imply one x0 and eps. float32 leaves rounding errors, most of them near SNR 0."""
    kinds = ["sample", "v_prediction"] if schedule.has_zero_terminal_snr else DIFFUSION_KINDS
    first, *others = [generated(sampler, schedule, kind, num=4) for kind in kinds]

    assert first.isfinite().all()
    for other in others:
        assert_close(other, first, absolute=1e-3)


@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
def test_ancestral_sampling_has_the_spread_of_its_own_recursion(kind):
    """x_{t-1} = c0 x0_hat(x) + ct x + sqrt(v) z is linear in x here.

    So its variance is a product over all 1000 steps.
    """
    mean, variance = 0.0, 1.0
    for t in range(999, -1, -1):
        at, before = LINEAR.level(torch.tensor([t])), LINEAR.level_before(torch.tensor([t]))
        a, s = at.alpha.item(), at.sigma.item()
        a_before, s_before = before.alpha.item(), before.sigma.item()
        step = s**2 - (a / a_before) ** 2 * s_before**2
        c0 = a_before * step / s**2
        ct = a / a_before * s_before**2 / s**2
        v = step * s_before**2 / s**2
        slope = a * DATA.std**2 / (a**2 * DATA.std**2 + s**2)  # of E[x0 | x]
        mean = c0 * (DATA.mean + slope * (mean - a * DATA.mean)) + ct * mean
        variance = (c0 * slope + ct) ** 2 * variance + v
    x = generated(DDPM(steps=1000), LINEAR, kind, num=32)

    assert_close(x.mean(), mean, absolute=4 * math.sqrt(variance / x.numel()))
    assert_close(x.std(), math.sqrt(variance), absolute=4 * math.sqrt(variance / (2 * x.numel())))
    assert_close(math.sqrt(variance), DATA.std, relative=0.02)


@pytest.mark.parametrize(("steps", "eta"), [(50, 0.0), (20, 0.0), (20, 0.5)])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddim_takes_the_steps_of_its_formula(schedule, steps, eta):
    """The same noise goes through the objective's own transition in float64."""
    made = generator(DDIM(steps=steps, eta=eta), schedule)
    indices = [0, 1, 2]
    x = made._reverse(Optimal("epsilon", schedule), indices, CPU, None)

    again, noises = first_noise(made, indices), sampler_noise(made, indices)
    jump = 1000 // steps
    for t in range(999, -1, -jump):
        level = schedule.level(torch.full((3,), t))
        before = schedule.level_before(torch.full((3,), t), jump)
        eps = DATA.conditional_mean("epsilon", again, level)
        noise = None
        if eta > 0:
            noise = torch.stack([torch.randn(1, 16, 16, generator=g) for g in noises]).double()
        again = ddim(again, estimate("epsilon", eps, again, level), level, before, eta, noise)

    assert_close(x, again, absolute=2e-4)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_takes_the_steps_of_its_formula(steps, shift):
    schedule = NoiseSchedule.flow(shift=shift)
    made = generator(FlowEuler(steps=steps), schedule, "flow_prediction")
    x = made._reverse(Optimal("flow_prediction", schedule), [0, 1], CPU, None)
    scheduler = made.scheduler
    scheduler.set_timesteps(steps)

    again = first_noise(made, [0, 1])
    sigmas = [*(scheduler.timesteps.double() / 1000), torch.tensor(0.0, dtype=torch.float64)]
    for sigma, following in pairwise(sigmas):
        level, before = (NoiseLevel(1 - s.expand(2), s.expand(2)) for s in (sigma, following))
        u = DATA.conditional_mean("flow_prediction", again, level)
        again = flow_euler(again, estimate("flow_prediction", u, again, level), level, before)

    assert sigmas[0] == 1
    assert_close(x, again, absolute=1e-4)


def test_flow_euler_gives_the_datas_mean_and_spread():
    x = generated(FlowEuler(steps=400), FLOW, "flow_prediction")

    assert_close(x.mean(), DATA.mean, absolute=4 * DATA.std / math.sqrt(x.numel()))
    assert_close(x.std(), DATA.std, relative=0.04)


def test_euler_and_ddim_are_one_method():
    """Both are Euler steps of one equation in sigma / alpha.

    Euler starts 1/2 (alpha/sigma)^2 = 2e-5 off.
    """
    assert_close(generated(Euler(steps=50), num=4), generated(DDIM(steps=50), num=4), absolute=1e-3)


def test_an_ancestral_ddim_survives_a_zero_terminal_schedule():
    """The root of 1 - alpha^2 - eta^2 v rounds below 0 there."""
    assert generated(DDIM(steps=50, eta=1.0), ZERO_TERMINAL, "v_prediction", num=2).isfinite().all()


def first_noise(made: SampleGenerator, indices: list[int]) -> Tensor:
    return Rng(made.sampling.seed, 0, indices).normal(made.shape, "initial").double()


def sampler_noise(made: SampleGenerator, indices: list[int]) -> list[torch.Generator]:
    return Rng(made.sampling.seed, 0, indices).generators("sampler")


# Indices


@pytest.mark.parametrize("of", [1, 2, 3, 8])
@pytest.mark.parametrize(("num", "size"), [(1, 4), (4, 4), (5, 4), (100, 7), (3, 100), (64, 8)])
def test_each_index_is_dealt_once(num, size, of):
    dealt = [list(blocks(num, size, index, of)) for index in range(of)]

    assert sorted(i for own in dealt for block in own for i in block) == list(range(num))


@pytest.mark.parametrize("of", [2, 3, 8])
def test_blocks_are_the_same_on_any_number_of_processes(of):
    alone = list(blocks(50, 8, 0, 1))

    assert sorted(block for index in range(of) for block in blocks(50, 8, index, of)) == alone


SAMPLERS = [
    DDPM(steps=5),
    DDIM(steps=5),
    DDIM(steps=5, eta=1.0),
    DPMSolver(steps=5),
    UniPC(steps=5),
    Euler(steps=5),
]


@pytest.mark.parametrize(
    "sampler",
    SAMPLERS,
    ids=lambda sampler: f"{sampler.registered_as[1]}{getattr(sampler, 'eta', '')}",
)
def test_a_sample_is_the_same_whatever_comes_after_it(sampler):
    made = generator(sampler, shape=(1, 4, 4))
    few = [made(Optimal("epsilon", LINEAR), block, CPU) for block in blocks(8, 4, 0, 1)]
    many = [made(Optimal("epsilon", LINEAR), block, CPU) for block in blocks(14, 4, 0, 1)]

    assert torch.equal(torch.cat(few), torch.cat(many)[:8])


@pytest.mark.parametrize(
    "sampler",
    SAMPLERS,
    ids=lambda sampler: f"{sampler.registered_as[1]}{getattr(sampler, 'eta', '')}",
)
def test_a_sample_alone_is_the_sample_among_others(sampler):
    """The noise of each step belongs to the sample too.

    The denoiser of this test works on each number by itself.
    """
    made, optimal = generator(sampler, shape=(1, 4, 4)), Optimal("epsilon", LINEAR)

    assert torch.equal(made(optimal, [6], CPU)[0], made(optimal, [4, 5, 6, 7], CPU)[2])


def test_two_samples_differ_and_another_seed_changes_both():
    made, optimal = generator(DDIM(steps=5), shape=(1, 4, 4)), Optimal("epsilon", LINEAR)
    first, second = made(optimal, [0, 1], CPU)

    assert not torch.equal(first, second)
    assert not torch.equal(made.with_seed(1)(optimal, [0], CPU)[0], first)
    assert torch.equal(made(optimal, [0], CPU)[0], first)


# Guidance and learned variance


class Table:
    """A network that predicts a constant x0 for each label, and remembers the labels."""

    values = torch.tensor([-0.5, 0.25, 0.75])

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.asked += cond["class_labels"].tolist()
        return expand_like(self.values[cond["class_labels"]], x).expand_as(x)


def guided_pixels(guidance: float) -> tuple[Tensor, Table]:
    """Return pixels of labels 0 and 1 after one step, whose x0 is the network's output."""
    table = Table()
    made = generator(
        DDIM(steps=1), LINEAR, "sample", (1, 2, 2), ClassConditioning(2, 3, 0.1), guidance=guidance
    )
    return made(table, [0, 1], CPU), table


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 1.2])
def test_the_guided_output_is_the_formula(guidance):
    null = Table.values[2]
    expected = null + guidance * (Table.values[:2] - null)

    images, _ = guided_pixels(guidance)

    pixels = ((expected.clamp(-1, 1) + 1) * 127.5).round().int()
    assert images[:, 0, 0, 0].tolist() == pixels.tolist()


def test_guidance_of_one_never_asks_for_the_null_label():
    assert guided_pixels(1.0)[1].asked == [0, 1]
    assert guided_pixels(1.1)[1].asked == [0, 1, 2, 2]


def test_labels_default_to_the_classes_in_turn_and_can_be_given():
    table = Table()
    made = generator(DDIM(steps=1), LINEAR, "sample", (1, 2, 2), ClassConditioning(2, 3, 0.1))
    made(table, [3, 4, 5], CPU)
    made(table, [3, 4, 5], CPU, torch.tensor([1, 1, 1]))

    assert table.asked == [1, 0, 1, 1, 1, 1]


def with_variance(sampler, v: float, shape=(1, 4, 4)) -> Tensor:
    """Return samples of a network whose second half of channels is v everywhere."""
    optimal = Optimal("epsilon", LINEAR)

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.cat([optimal(x, time, cond), torch.full_like(x, v)], 1)

    made = generator(sampler, shape=shape, variance=LearnedRange())
    return made._reverse(network, [0, 1, 2], CPU, None)


def test_a_learned_variance_reaches_the_ancestral_sampler():
    """v = -1 is the posterior's variance, as without a learned one; v = 1 is beta, larger."""
    small, large = (with_variance(DDPM(steps=10), v) for v in (-1.0, 1.0))

    assert_close(small, generated(DDPM(steps=10), num=3, shape=(1, 4, 4)), absolute=1e-3)
    assert (large - small).abs().max() > 0.01


@pytest.mark.parametrize(
    "sampler", [DDIM(steps=5), DPMSolver(steps=5), UniPC(steps=5), Euler(steps=5)]
)
def test_other_samplers_leave_a_learned_variance_aside(sampler):
    assert torch.equal(with_variance(sampler, 0.3), generated(sampler, num=3, shape=(1, 4, 4)))


def test_guidance_keeps_the_conditional_variance():
    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        labels = expand_like(cond["class_labels"], x).expand_as(x)
        return torch.cat([0 * labels, labels], 1)

    x, time = torch.zeros(2, 1, 2, 2), torch.tensor([5, 5])
    cond = conditioned(ClassConditioning(2, 3, 0.1), torch.tensor([0, 1]), 2, 2.0, CPU)
    output = guided(network, x, time, cond, 2.0)

    assert output[:, 1].flatten(1).mean(1).tolist() == [0, 1]


# Clips


@pytest.mark.parametrize(
    "sampler",
    [DDPM(steps=6), DDIM(steps=6, eta=0.5), DPMSolver(steps=6), UniPC(steps=6), Euler(steps=6)],
)
def test_a_clip_is_sampled_as_one_tall_image_of_all_its_frames(sampler):
    """The noise of a sample is one sequence, and the test's network works number by number."""
    clip, image = (generated(sampler, num=3, shape=shape) for shape in [(2, 4, 8, 8), (2, 32, 8)])

    assert torch.equal(clip, image.reshape(3, 2, 4, 8, 8))


def test_a_clip_of_a_flow_model_and_one_with_a_learned_variance():
    clip, image = (
        generated(FlowEuler(steps=4), FLOW, "flow_prediction", 2, shape=shape)
        for shape in [(1, 4, 8, 8), (1, 32, 8)]
    )
    assert torch.equal(clip, image.reshape(2, 1, 4, 8, 8))

    clip, image = (with_variance(DDPM(steps=4), 0.3, shape) for shape in [(1, 4, 8, 8), (1, 32, 8)])
    assert torch.equal(clip, image.reshape(3, 1, 4, 8, 8))


def test_clips_come_out_as_pixels():
    pixels = generator(DDIM(steps=4), shape=(3, 5, 8, 8))(Optimal("epsilon", LINEAR), [0, 1], CPU)

    assert (pixels.shape, pixels.dtype) == ((2, 3, 5, 8, 8), torch.uint8)


# Tensors


def test_tensors_come_out_as_floats_and_are_not_clipped():
    """Points around 3, which pixels would not reach: E[x0 | x_t] of one Gaussian."""
    far = Gaussian(mean=3.0, std=0.5)

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return far.conditional_mean("epsilon", x.double(), LINEAR.level(time.long())).float()

    made = generator(DDIM(steps=100), shape=(2,), items="tensors")
    points = made(network, list(range(500)), CPU)

    assert (points.shape, points.dtype) == ((500, 2), torch.float32)
    assert not made.clips
    assert not made.scheduler.config.clip_sample
    assert_close(points.mean(), 3.0, absolute=4 * 0.5 / math.sqrt(1000))
    assert_close(points.std(), 0.5, relative=0.1)


def test_generated_tensors_are_the_blocks_in_order():
    made = generator(DDIM(steps=2), shape=(2,), items="tensors", block_size=4)
    optimal = Optimal("epsilon", LINEAR)

    points = generate(made, optimal, 6, CPU)

    expected = torch.cat([made(optimal, [0, 1, 2, 3], CPU), made(optimal, [4, 5], CPU)])
    assert points.dtype == torch.float32
    assert torch.equal(points, expected)


# Guidance that cannot be


def test_guidance_without_a_null_label_is_refused():
    with pytest.raises(InputError, match=r"guidance: 2.0 needs a null label"):
        generator(DDIM(), conditioning=ClassConditioning(10, 10), guidance=2.0)


def test_the_estimate_of_the_tests_network_is_the_datas_posterior():
    """At SNR 1 with data of spread s the posterior mean lies s^2 / (s^2 + 1) of the way."""
    level = NoiseLevel(*(torch.tensor([0.5**0.5], dtype=torch.float64),) * 2)
    x = torch.tensor([[1.0]], dtype=torch.float64)
    implied: Estimate = estimate("epsilon", DATA.conditional_mean("epsilon", x, level), x, level)
    shrink = DATA.std**2 / (DATA.std**2 + 1)

    assert_close(implied.x0, DATA.mean + shrink * (x * 2**0.5 - DATA.mean), absolute=1e-12)
