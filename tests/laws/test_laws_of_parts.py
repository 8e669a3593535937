"""Laws over the registries, for each part with its default arguments. Registering one adds it."""

import inspect
import re

import pytest
import torch
from helpers.support import PARAMETERIZATIONS, assert_close, images
from hypothesis import assume, given
from hypothesis import strategies as st

from difftrain.core.registry import dump, parameters
from difftrain.core.rng import Rng
from difftrain.objective.noise import InputPerturbation, Offset, White
from difftrain.objective.objective import Objective
from difftrain.objective.parameterization import target
from difftrain.objective.schedule import SCHEDULES, NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.slots import (
    ERRORS,
    NOISES,
    PERTURBATIONS,
    REGULARIZERS,
    TIMESTEPS,
    VARIANCES,
    WEIGHTINGS,
)
from difftrain.objective.timesteps import LogitNormal, Stratified, Uniform
from difftrain.objective.types import Batch
from difftrain.objective.weightings import P2, Debiased, Unit, converted, weight_table


def over(registry, argument="name"):
    return pytest.mark.parametrize(argument, list(registry.constructors))


def default_part(registry, name):
    return registry.parse(name, registry.slot).build()


amount = st.floats(1e-6, 10.0)
levels = st.lists(st.tuples(amount, amount), min_size=1, max_size=6).map(
    lambda pairs: NoiseLevel(*torch.tensor(pairs, dtype=torch.float64).unbind(1))
)
image_shapes = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 3),
    ),  # videos
)
splits = st.permutations(range(6)).flatmap(
    lambda order: st.integers(1, 5).map(lambda cut: [order[:cut], order[cut:]])
)
any_step = st.integers(0, 10**6)


# Every part


PARTS = [
    (registry, name)
    for registry in (
        ERRORS,
        NOISES,
        PERTURBATIONS,
        SCHEDULES,
        TIMESTEPS,
        VARIANCES,
        WEIGHTINGS,
        REGULARIZERS,
    )
    for name in registry.constructors
]
of_every_part = pytest.mark.parametrize(
    ("registry", "name"), PARTS, ids=lambda v: v if isinstance(v, str) else v.slot
)


@of_every_part
def test_a_part_survives_its_recipe_block(registry, name):
    part = registry.parse(name, registry.slot)

    again = registry.parse(part.dump(), registry.slot)

    assert again == part
    assert again.dump() == part.dump() == {"type": name, **part.dump()}


@of_every_part
def test_a_built_part_knows_the_block_that_builds_an_equal_one(registry, name):
    part = registry.parse(name, registry.slot)
    built = part.build()
    if registry is SCHEDULES:  # functions: what they return is no part, its tables must be equal
        again = registry.parse(part.dump(), registry.slot).build()
        assert torch.equal(again.alpha, built.alpha)
        assert torch.equal(again.sigma, built.sigma)
        return
    assert dump(built) == part.dump()
    again = registry.parse(dump(built), registry.slot).build()
    assert type(again) is type(built)
    if isinstance(built, torch.nn.Module):  # == compares the identity of modules
        assert dump(again) == dump(built)
    else:
        assert again == built


@of_every_part
def test_the_documentation_of_a_part_opens_with_its_formula_and_has_all_arguments(registry, name):
    constructor = registry.constructors[name]
    first, *others = inspect.cleandoc(constructor.__doc__).split("\n\n")
    sections = {text.partition(":")[0]: text for text in others}

    assert re.fullmatch(r"[A-Za-z].*: ``.+``.*", first), "what it is: ``formula``"
    assert re.findall(r"^    (\w+): ", sections.get("Args", ""), re.M) == [*parameters(constructor)]
    if "Reference" in sections:
        assert re.search(r"\b(19|20)\d\d, ", sections["Reference"]), "a year"


# Schedules


@over(SCHEDULES)
@given(num=st.integers(2, 200))
def test_every_schedule_goes_from_signal_to_noise(name, num):
    schedule = SCHEDULES.parse({"type": name, "num_timesteps": num}, "schedule").build()

    assert schedule.num_timesteps == len(schedule.sigma) == num
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert bool((schedule.alpha.diff() <= 0).all())
    assert bool((schedule.sigma.diff() >= 0).all())
    assert bool(
        (
            (schedule.alpha >= 0)
            & (schedule.alpha <= 1)
            & (schedule.sigma >= 0)
            & (schedule.sigma <= 1)
        ).all()
    )


# Weightings


@over(WEIGHTINGS)
@given(level=levels)
def test_a_weighting_is_one_finite_non_negative_float64_for_each_sample(name, level):
    weight = default_part(WEIGHTINGS, name)(level)

    assert weight.shape == level.alpha.shape
    assert weight.dtype == torch.float64
    assert bool((weight >= 0).all())
    assert bool(weight.isfinite().all())


@over(WEIGHTINGS)
@given(level=levels)
def test_a_weight_depends_on_its_own_sample_alone(name, level):
    weighting = default_part(WEIGHTINGS, name)
    alone = torch.cat([weighting(level[i : i + 1]) for i in range(len(level.alpha))])

    # Vectorised powers may differ in their last bit.
    assert_close(alone, weighting(level), relative=1e-13)


@over(WEIGHTINGS)
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.linear(), NoiseSchedule.cosine()], ids=["linear", "cosine"]
)
def test_a_table_of_weights_is_finite_and_non_negative_for_every_parameterization(
    name, kind, schedule
):
    table = weight_table(default_part(WEIGHTINGS, name), kind, schedule)

    assert table.shape == (1000,)
    assert bool(((table >= 0) & table.isfinite()).all())


@over(WEIGHTINGS)
@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(zero_terminal_snr=True), NoiseSchedule.flow()],
    ids=["zero_terminal", "flow"],
)
def test_every_weighting_is_finite_on_v_and_flow_where_the_schedule_ends_at_snr_0(name, schedule):
    for kind in ("v_prediction", "flow_prediction"):
        assert bool(weight_table(default_part(WEIGHTINGS, name), kind, schedule).isfinite().all())


@over(WEIGHTINGS)
def test_the_objectives_gradient_on_x0_is_the_same_through_every_parameterization(name):
    weighting = default_part(WEIGHTINGS, name)
    if weighting.stated_for is None:
        pytest.skip("weighs whatever error is trained: not one function of x0")
    schedule, gradients = NoiseSchedule.linear(), []
    for kind in PARAMETERIZATIONS:
        x0_hat = images(4, seed=3).requires_grad_(True)

        def denoiser(x, t, cond, kind=kind, x0_hat=x0_hat):
            level = schedule.level(t)
            eps_hat = (x - expand_like(level.alpha, x) * x0_hat) / expand_like(level.sigma, x)
            return target(kind, x0_hat, eps_hat, level)

        losses = Objective(schedule, kind, weighting)(
            denoiser, Batch(images(4)), Rng(0, 0, range(4))
        )
        gradients.append(torch.autograd.grad(losses.total, x0_hat)[0])

    assert bool((gradients[0] != 0).all())
    for gradient in gradients[1:]:
        # Through eps and back: sigma >= 0.01, alpha >= 0.006.
        assert_close(gradient, gradients[0], relative=1e-7)


# Noise and perturbation


OF_FRAMES = {"mixed"}  # noises that are defined for videos alone


def zeros(name, num, device=None):
    return torch.zeros(num, 2, *([4] if name in OF_FRAMES else []), 3, 3, device=device)


@over(NOISES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(shape=image_shapes)
def test_noise_has_the_shape_dtype_and_device_of_the_image(name, dtype, shape):
    assume(len(shape) == 5 or name not in OF_FRAMES)
    x0 = torch.zeros(shape, dtype=dtype)
    eps = default_part(NOISES, name)(x0, Rng(0, 0, range(shape[0])))

    assert (eps.shape, eps.dtype, eps.device) == (x0.shape, dtype, x0.device)
    assert bool(eps.isfinite().all())
    assert not eps.requires_grad


@over(NOISES)
def test_noise_lies_where_the_image_does(name):
    assert (
        default_part(NOISES, name)(zeros(name, 2, device="meta"), Rng(0, 0, range(2))).device.type
        == "meta"
    )


@over(NOISES)
@given(split=splits, step=any_step)
def test_noise_of_any_split_of_the_batch_is_that_of_the_whole(name, split, step):
    x0, noise = zeros(name, 6), default_part(NOISES, name)
    whole = noise(x0, Rng(0, step, range(6)))

    for rows in split:
        assert torch.equal(noise(x0[rows], Rng(0, step, rows, batch_size=6)), whole[rows])


@over(PERTURBATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(shape=image_shapes)
def test_a_perturbation_keeps_shape_and_dtype_and_its_input(name, dtype, shape):
    eps = torch.full(shape, 0.5, dtype=dtype)
    level = NoiseSchedule.linear().level(torch.arange(shape[0]))

    eps_in = default_part(PERTURBATIONS, name)(eps, level, Rng(0, 0, range(shape[0])))

    assert (eps_in.shape, eps_in.dtype) == (eps.shape, dtype)
    assert bool((eps == 0.5).all())


@over(PERTURBATIONS)
@given(split=splits, step=any_step)
def test_perturbation_of_any_split_of_the_batch_is_that_of_the_whole(name, split, step):
    eps = images(6)
    perturbation = default_part(PERTURBATIONS, name)
    level = NoiseSchedule.linear().level(torch.arange(6))
    whole = perturbation(eps, level, Rng(0, step, range(6)))

    for rows in split:
        assert torch.equal(
            perturbation(eps[rows], level[torch.tensor(rows)], Rng(0, step, rows, batch_size=6)),
            whole[rows],
        )


# Errors


@over(ERRORS)
@given(shape=image_shapes, scale=st.floats(1e-3, 1e3))
def test_an_error_is_non_negative_for_each_sample_and_zero_for_equal_inputs(name, shape, scale):
    generator = torch.Generator().manual_seed(0)
    a, b = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    error = default_part(ERRORS, name)

    found = error(a, b)

    assert found.shape == shape[:1]
    assert found.dtype == torch.float64
    assert bool((found > 0).all())
    assert bool((error(a, a) == 0).all())
    assert_close(error(b, a), found, relative=1e-12)
    assert_close(
        torch.cat([error(a[i : i + 1], b[i : i + 1]) for i in range(shape[0])]),
        found,
        relative=1e-12,
    )


@over(ERRORS)
def test_an_error_rejects_shapes_that_only_broadcast(name):
    with pytest.raises(
        ValueError, match=r"^expected equal shapes, got \[2, 3, 4, 4\] and \[2, 1, 4, 4\]$"
    ):
        default_part(ERRORS, name)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))


# Timesteps


@over(TIMESTEPS)
@given(step=any_step, num=st.integers(1, 40))
def test_timesteps_lie_on_the_schedule_with_positive_importance(name, step, num):
    drawn = default_part(TIMESTEPS, name)(1000, Rng(0, step, range(num)))

    assert drawn.t.shape == drawn.importance.shape == (num,)
    assert (drawn.t.dtype, drawn.importance.dtype) == (torch.int64, torch.float64)
    assert bool(((drawn.t >= 0) & (drawn.t < 1000)).all())
    assert bool((drawn.importance > 0).all())


@over(TIMESTEPS)
@given(split=splits, step=any_step)
def test_timesteps_of_any_split_of_the_batch_are_those_of_the_whole(name, split, step):
    sampler = default_part(TIMESTEPS, name)
    whole = sampler(1000, Rng(0, step, range(6)))

    for rows in split:
        part = sampler(1000, Rng(0, step, rows, batch_size=6))
        assert torch.equal(part.t, whole.t[rows])
        assert torch.equal(part.importance, whole.importance[rows])


UNBIASED = [
    Uniform(),
    Stratified(),
    LogitNormal(unbiased=True),
    LogitNormal(0.5, 2.0, unbiased=True),
]


@pytest.mark.parametrize("sampler", UNBIASED, ids=repr)
def test_importance_makes_the_mean_of_any_function_of_t_the_uniform_one(sampler):
    drawn = sampler(8, Rng(0, 0, range(8000)))
    # Indicators span all functions of t.
    of_each_t = torch.nn.functional.one_hot(drawn.t, 8) * drawn.importance[:, None]

    error = of_each_t.std(0) / 8000**0.5
    assert bool(((of_each_t.mean(0) - 1 / 8).abs() <= 4 * error).all())


# Strength 0 is absence


def loss_of(objective, step=0):
    def denoiser(x, t, cond):
        return 0.3 * x + expand_like(t / 1000, x)

    return objective(denoiser, Batch(images(4)), Rng(0, step, range(4)))


@pytest.mark.parametrize(
    "parts",
    [
        dict(perturbation=InputPerturbation(gamma=0.0)),
        dict(perturbation=InputPerturbation(gamma=0.0, target="implied_eps")),
        dict(noise=Offset(strength=0.0)),
        dict(weighting=P2(gamma=0.0)),
    ],
    ids=["perturbation", "perturbation of implied eps", "offset", "p2"],
)
def test_strength_zero_equals_absence_bit_for_bit(parts):
    plain = loss_of(Objective(NoiseSchedule.linear(), "epsilon"))
    zero = loss_of(Objective(NoiseSchedule.linear(), "epsilon", **parts))

    assert torch.equal(zero.total, plain.total)
    assert torch.equal(zero.errors, plain.errors)
    assert zero.terms.keys() == plain.terms.keys()


@over(PERTURBATIONS)
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_a_clean_perturbation_of_strength_zero_equals_absence_for_every_parameterization(
    name, kind
):
    zero = PERTURBATIONS.parse({"type": name, "gamma": 0.0}, "perturbation").build()
    plain, with_zero = (
        loss_of(Objective(NoiseSchedule.linear(), kind, perturbation=p)) for p in (None, zero)
    )

    assert torch.equal(with_zero.total, plain.total)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 4, 4), (3,)], ids=["image", "video", "vector"])
def test_offset_of_strength_zero_is_white_noise(shape):
    x0, rng = torch.zeros(2, *shape), Rng(0, 0, range(2))
    assert torch.equal(Offset(0.0)(x0, rng), White()(x0, rng))


@over(REGULARIZERS)
def test_a_regularizer_of_weight_zero_is_absent(name):
    zero = REGULARIZERS.parse({"type": name, "weight": 0.0}, "regularizer").build()
    plain = loss_of(Objective(NoiseSchedule.linear(), "epsilon"))
    with_zero = loss_of(Objective(NoiseSchedule.linear(), "epsilon", regularizers=[zero]))

    assert torch.equal(with_zero.total, plain.total)
    assert with_zero.terms.keys() == plain.terms.keys()


# A batch and its micro-batches


SLOTS = [
    ("weighting", WEIGHTINGS),
    ("timesteps", TIMESTEPS),
    ("noise", NOISES),
    ("perturbation", PERTURBATIONS),
    ("error", ERRORS),
    ("variance", VARIANCES),
]


@pytest.mark.parametrize(
    ("slot", "name"), [(slot, name) for slot, registry in SLOTS for name in registry.constructors]
)
@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 4, 3, 3), (5,)], ids=["image", "video", "vector"])
def test_loss_of_a_batch_is_the_mean_over_its_micro_batches(slot, name, shape):
    if slot == "noise" and name in OF_FRAMES and len(shape) != 4:
        pytest.skip("for videos alone")
    part = default_part(dict(SLOTS)[slot], name)
    objective = Objective(NoiseSchedule.linear(), "epsilon", **{slot: part})
    x0 = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = getattr(part, "output_channels", 1)

    def denoiser(x, t, cond):
        return (0.3 * x + expand_like(t / 1000, x) + expand_like(cond["label"], x)).repeat(
            1, channels, *[1] * (x.ndim - 2)
        )

    def losses(rows):
        return objective(
            denoiser,
            Batch(x0[rows], {"label": torch.arange(6.0).double()[rows]}),
            Rng(0, 3, rows, batch_size=6),
        )

    whole, parts = losses([0, 1, 2, 3, 4, 5]), [losses([4, 0]), losses([1, 5]), losses([3, 2])]

    assert_close(torch.stack([p.total for p in parts]).mean(), whole.total, relative=1e-12)
    for term, value in whole.terms.items():
        assert_close(torch.stack([p.terms[term] for p in parts]).mean(), value, relative=1e-12)
    assert_close(
        torch.cat([p.errors for p in parts]), whole.errors[[4, 0, 1, 5, 3, 2]], relative=1e-12
    )


@over(WEIGHTINGS)
@given(level=levels)
def test_conversion_there_and_back_is_the_weighting_itself(name, level):
    weighting = default_part(WEIGHTINGS, name)
    for kind in PARAMETERIZATIONS:
        if weighting.stated_for in (None, kind):
            assert_close(converted(weighting, kind, level), weighting(level), relative=1e-14)


def test_named_defaults_are_those_of_the_literature():
    assert (P2().gamma, P2().k, Debiased().max_weight, InputPerturbation().gamma) == (
        1.0,
        1.0,
        None,
        0.1,
    )
    assert Objective(NoiseSchedule.linear(), "epsilon").weighting == Unit()
