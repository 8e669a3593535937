"""Interpolation distances against stored numbers, and the DDIM chain against diffusers' sampler."""

import math

import pytest
import torch
from helpers.subjects import COSINE, clean, f64, gaussian_subject
from helpers.support import Gaussian, assert_close

from difftrain.core.rng import Rng
from difftrain.data.transform import to_uint8
from difftrain.diagnostics.base import Subject
from difftrain.diagnostics.reverse_process import descent, last_state
from difftrain.diagnostics.smoothness import Smoothness, adjacent_distances, slerp
from difftrain.diagnostics.spacing import trailing_timesteps
from difftrain.generation.generator import SampleGenerator, Sampling
from difftrain.generation.samplers import DDIM, FlowEuler
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.variance import FixedVariance

SHAPE = (1, 2, 4)


def test_distances_have_the_stored_numbers():
    """Constant 3 x 4 x 4 images of 10 k, and of 100 (k/10)^2."""
    k = torch.arange(11, dtype=torch.float64)
    images = torch.stack([10 * k, 100 * (k / 10) ** 2])[:, :, None, None, None].expand(
        2, 11, 3, 4, 4
    )
    found = adjacent_distances(images)

    assert_close(found[0], [69.282032302755] * 10, relative=1e-12)
    assert_close(found[1, [0, 9]], [6.9282032302755, 131.63586137523], relative=1e-12)
    assert_close(found.std(1, correction=0), [0, 39.7994974842648], absolute=1e-12)
    assert_close(
        adjacent_distances(images / 255).std(1, correction=0).mean(),
        0.07803823036130357,
        relative=1e-12,
    )


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0.0, (1, 0)),
        (0.1, (0.9876883405951378, 0.31286893008046174)),
        (0.5, (0.7071067811865475, 1.414213562373095)),
        (0.9, (0.15643446504023084, 1.9753766811902755)),
        (1.0, (0, 2)),
    ],
)
def test_slerp_has_the_stored_numbers(position, expected):
    a, b = f64([[1.0, 0, 0, 0]]), f64([[0, 2.0, 0, 0]])

    assert_close(slerp(a, b, position)[0, :2], expected, absolute=1e-15)


def test_slerp_is_a_straight_line_between_parallel_vectors_alone():
    a = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.stack([2 * a[0], -a[1], torch.flip(a[2], (-1,))])
    line = 0.7 * a + 0.3 * b

    assert_close(slerp(a, b, 0.3)[:2], line[:2], absolute=1e-15)
    assert (slerp(a, b, 0.3)[2] - line[2]).abs().max() > 0.01


def network(x, time, cond):
    """Not linear, and another one for each label and time."""
    label = cond["class_labels"].to(x) if cond else torch.zeros(len(x))
    return torch.tanh(x.flip(-1) + 0.3 * expand_like(label, x)) + expand_like(time.to(x) / 1000, x)


@pytest.mark.parametrize(
    ("kind", "schedule", "sampler"),
    [
        ("v_prediction", COSINE, DDIM(steps=8)),
        ("epsilon", NoiseSchedule.linear(), DDIM(steps=10)),
        ("sample", COSINE, DDIM(steps=4)),
    ],
    ids=["v", "epsilon", "x0"],
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_deterministic_chain_is_diffusers_ddim(kind, schedule, sampler, guidance):
    """For steps that divide the timesteps: otherwise diffusers' steps do not meet."""
    classes = ClassConditioning(3, 4, 0.1)
    generator = SampleGenerator(
        Sampling(sampler, guidance=guidance), schedule, kind, FixedVariance(), classes, SHAPE
    )
    of = Subject(
        network,
        schedule,
        kind,
        FixedVariance(),
        classes,
        SHAPE,
        clean(torch.zeros(5, *SHAPE), torch.zeros(5)),
        guidance=guidance,
    )
    indices = list(range(5))
    x, timesteps = (
        Rng(0, 0, indices).normal(SHAPE, "initial"),
        trailing_timesteps(1000, sampler.steps),
    )
    found = last_state(
        descent(of, x, timesteps, classes.labels_of(indices), "ddim", Rng(0), guidance)
    )

    away = (to_uint8(found).int() - generator(network, indices, torch.device("cpu")).int()).abs()
    assert away.max() <= 1  # float32 tables there
    assert (away > 0).double().mean() < 0.05


def test_the_deterministic_chain_of_a_flow_is_eulers_step():
    schedule, kind = NoiseSchedule.flow(100), "flow_prediction"
    none = ClassConditioning(None, None)
    generator = SampleGenerator(
        Sampling(FlowEuler(steps=100)), schedule, kind, FixedVariance(), none, SHAPE
    )
    of = Subject(
        network,
        schedule,
        kind,
        FixedVariance(),
        none,
        SHAPE,
        clean(torch.zeros(3, *SHAPE)),
        clips=False,
    )
    x = Rng(0, 0, range(3)).normal(SHAPE, "initial")
    found = last_state(descent(of, x, list(range(100)), None, "ddim", Rng(0)))

    away = (to_uint8(found).int() - generator(network, [0, 1, 2], torch.device("cpu")).int()).abs()
    assert away.max() <= 1


def test_istd_of_a_linear_field_is_that_of_its_noises_times_its_gain():
    """Data N(0, 0.1^2): an image is g z, g the product over DDIM steps; nothing leaves [-1, 1]."""
    data, diagnostic = Gaussian(0.0, 0.1), Smoothness(num=6, steps=20)
    found = diagnostic(gaussian_subject(data, 4))
    g, timesteps = 1.0, trailing_timesteps(1000, 20)
    for k in reversed(range(20)):
        level, below = (
            COSINE.level(torch.tensor([timesteps[k]])),
            COSINE.level_before(torch.tensor([timesteps[k]]), 50),
        )
        x0 = (level.alpha * 0.01 / (level.alpha**2 * 0.01 + level.sigma**2)).item()
        g *= (below.alpha * x0 + below.sigma * (1 - level.alpha * x0) / level.sigma).item()
    z1, z2 = (
        Rng(0, 0, range(6)).normal(SHAPE, f"diagnostics.{name}").double()
        for name in ("first", "second")
    )
    path = torch.stack([slerp(z1, z2, k / 10) for k in range(11)], dim=1)
    expected = g / 2 * adjacent_distances(path)

    assert_close(found["value"], expected.std(1, correction=0).mean(), relative=1e-4)
    assert_close(f64(found["by_interval"]), expected.mean(0), relative=1e-5)
    assert_close(found["mean_distance"], expected.mean(), relative=1e-5)
    assert_close(
        found["standard_error"], expected.std(1, correction=0).std() / math.sqrt(6), relative=1e-4
    )


def test_prompts_are_the_classes_in_turn_and_a_network_that_ignores_its_noise_is_smooth():
    classes, seen = ClassConditioning(3, 3), []

    def constant(x, time, cond):
        seen.append(cond["class_labels"])
        return expand_like(cond["class_labels"].to(x) / 10, x).expand_as(x)

    of = Subject(
        constant,
        COSINE,
        "sample",
        FixedVariance(),
        classes,
        SHAPE,
        clean(torch.zeros(1, *SHAPE), torch.zeros(1)),
        block_size=44,
    )
    found = Smoothness(num=5, steps=2, intervals=10)(of)

    assert (found["value"], found["mean_distance"]) == (0.0, 0.0)
    assert seen[0].tolist() == [label for label in (0, 1, 2, 0) for _ in range(11)]


def test_the_value_does_not_depend_on_the_blocks():
    one, other = (
        Smoothness(num=5, steps=3)(gaussian_subject(Gaussian(0, 0.1), 4, block_size=size))
        for size in (1, 40)
    )

    assert_close(one["value"], other["value"], relative=1e-5)
    assert one["protocol"]["ddof"] == 0
