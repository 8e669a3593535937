"""Laws over the registered regularizers, alone and beside each other. Registering one adds it.

Batches are clips of four frames, which all of them take; some do not take images.
"""

import pytest
import torch
from diffusers import UNet2DModel, UNet3DConditionModel
from helpers.support import (
    PARAMETERIZATIONS,
    Onlooker,
    assert_close,
    gradients,
    relative_distance,
    term_alone,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.noise import InputPerturbation, Offset
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import SCHEDULES, NoiseSchedule, expand_like
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.timesteps import LogitNormal
from difftrain.objective.types import Batch

NAMES = list(REGULARIZERS.constructors)
OPTIONS = {
    "step_variation": [
        {},
        {"central": True},
        {"method": "double_backward"},
        {"measured_batches": 2},
    ],
    "error_propagation": [{}, {"checkpointing": True}, {"step": "ddim"}, {"truncate": 1}],
    "noise_constraint": [{}, {"manner": "simple"}],
}
BLOCKS = [{"type": name, **options} for name in NAMES for options in OPTIONS.get(name, [{}])]
blocks = pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda block: " ".join(map(str, block.values()))
)
LINEAR = NoiseSchedule.linear()
CLIP, IMAGE = (2, 4, 3, 3), (2, 3, 3)


def built(block, **more):
    block = {"type": block} if isinstance(block, str) else block
    return REGULARIZERS.parse({**block, **more}, "regularizer").build()


def batch(shape=CLIP, num=6):
    generator = torch.Generator().manual_seed(0)
    x0 = 2 * torch.rand(num, *shape, generator=generator, dtype=torch.float64) - 1
    return Batch(x0, {"label": torch.arange(num) / num})


class Net(nn.Module):
    """Mixes the channels and looks at time, label and neighbours; smooth."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))

    def forward(self, x, t, cond):
        mixed = torch.einsum("dc,bc...->bd...", self.weight, x + 0.3 * x.roll(1, 2))
        return torch.tanh(mixed + expand_like(t / 1000, x) + expand_like(cond["label"], x))


def losses_of(
    regularizers, step=0, kind="v_prediction", schedule=LINEAR, shape=CLIP, network=None, **parts
):
    objective = Objective(schedule, kind, regularizers=regularizers, **parts)
    with objective.context():
        return objective(network or Net(), batch(shape), Rng(3, step, range(6)))


def gradient_of(regularizers, network, **case):
    objective = Objective(LINEAR, "v_prediction", regularizers=regularizers, **case)
    with objective.context():
        return gradients(objective(network, batch(), Rng(3, 0, range(6))), network)


def two_steps(regularizers, **parts):
    return [losses_of(regularizers, step, **parts) for step in (0, 1)]


# Beside each other


@given(order=st.permutations(NAMES))
def test_any_order_of_all_of_them_leaves_the_base_term_to_the_bit_and_each_term_to_rounding(order):
    parts = dict(timesteps=LogitNormal(), noise=Offset(0.1), perturbation=InputPerturbation(0.2))
    plain, together = two_steps([], **parts), two_steps([built(name) for name in order], **parts)
    alone = {name: two_steps([built(name)], **parts) for name in order}

    for step in (0, 1):
        assert torch.equal(together[step].terms["error"], plain[step].terms["error"])
        assert torch.equal(together[step].errors, plain[step].errors)
        assert list(together[step].terms) == ["error", *order]
        for name in order:
            assert_close(together[step].terms[name], alone[name][step].terms[name], relative=1e-12)
            for measure, value in alone[name][step].measures.items():
                assert_close(together[step].measures[measure], value, relative=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_more_changes_neither_what_others_draw_nor_what_they_see(name):
    seen = []
    for others in ([], [built(name)]):
        onlooker = Onlooker(differentiates_input=False)
        losses_of([*others, onlooker])
        (p,) = onlooker.passes
        seen.append((p.t, p.eps, p.x_t.detach(), p.estimate.x0.detach(), p.rng.normal((3,), "any")))

    for without, beside in zip(*seen, strict=True):
        assert torch.equal(without, beside)


def test_the_gradient_of_all_is_the_sum_of_each_ones():
    network = Net()
    together = gradient_of([built(name) for name in NAMES], network)
    plain = gradient_of([], network)
    each = [gradient_of([built(name)], network) - plain for name in NAMES]

    # A difference over h = 1e-7 adds its 1e-16 in another order.
    assert relative_distance(together, plain + sum(each)) <= 1e-6
    assert all(one.norm() > 1e-6 for one in each)


@pytest.mark.parametrize("name", NAMES)
def test_two_of_one_type_draw_different_numbers_and_keep_their_own_state(name):
    first, second = built(name), built(name)
    losses = losses_of([first, second])
    state = Objective(LINEAR, "epsilon", regularizers=[first, second]).state_dict()

    assert list(losses.terms) == ["error", name, f"{name}_2"]
    if name != "noise_constraint":  # which draws nothing
        assert losses.terms[name] != losses.terms[f"{name}_2"]
    assert len(state) == len(first.state_dict()) + len(second.state_dict())


# How much, and when


@blocks
def test_a_term_is_linear_in_its_weight(block):
    light = losses_of([built(block, weight=0.5)]).terms[block["type"]]
    heavy = losses_of([built(block, weight=3.0)]).terms[block["type"]]

    assert_close(heavy, 6 * light, relative=1e-12)
    assert light.item() > 0


@blocks
def test_with_weight_zero_it_is_absent_bit_for_bit_and_its_state_stays(block):
    zero = built(block, weight=0.0)
    before = {name: value.clone() for name, value in zero.state_dict().items()}
    plain, with_zero = losses_of([]), losses_of([zero])

    assert torch.equal(with_zero.total, plain.total)
    assert with_zero.terms.keys() == plain.terms.keys()
    assert with_zero.measures == {}
    assert all(torch.equal(value, before[name]) for name, value in zero.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@given(step=st.integers(0, 9), every=st.integers(1, 4), warmup=st.integers(0, 6))
def test_every_and_warmup_multiply_the_term_where_it_is_evaluated(name, step, every, warmup):
    plain = losses_of([built(name)], step).terms[name]
    terms = losses_of([built(name, every=every, warmup=warmup)], step).terms

    assert (name in terms) == (step % every == 0)
    if name in terms:
        assert_close(
            terms[name], every * min(1.0, (step + 1) / max(1, warmup)) * plain, relative=1e-12
        )


# State


@blocks
def test_its_state_is_all_that_its_next_steps_depend_on(block):
    straight = built(block)
    first = built(block)
    second = built(block)
    for step in (0, 1):
        losses_of([straight], step)
        losses_of([first], step)

    second.load_state_dict(first.state_dict())
    for step in (2, 3):
        one, other = losses_of([straight], step), losses_of([second], step)
        assert torch.equal(one.total, other.total)
        assert one.measures == other.measures
    assert all(
        torch.equal(value, second.state_dict()[name])
        for name, value in straight.state_dict().items()
    )


@blocks
def test_a_pass_without_gradients_has_a_value_and_leaves_the_state(block):
    regularizer = built(block)
    losses_of([regularizer])
    before = {name: value.clone() for name, value in regularizer.state_dict().items()}
    with torch.no_grad():
        losses = losses_of([regularizer], 1)

    assert bool(losses.total.isfinite())
    assert not losses.total.requires_grad
    assert losses.terms[block["type"]].item() > 0
    assert all(torch.equal(value, before[name]) for name, value in regularizer.state_dict().items())


@blocks
def test_it_leaves_torchs_global_generator_and_the_batch_as_they_were(block):
    x0 = batch().x0
    torch.manual_seed(5)
    before = torch.get_rng_state()

    losses_of(
        [built(block)],
        network=lambda x, t, cond: nn.functional.dropout(x, 0.5) * nn.Parameter(torch.ones(())),
    )

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(batch().x0, x0)


@blocks
def test_it_survives_its_recipe_block_with_these_options(block):
    part = REGULARIZERS.parse({**block, "weight": 0.3, "every": 2, "warmup": 7}, "regularizer")
    regularizer = part.build()

    assert REGULARIZERS.parse(part.dump(), "regularizer") == part
    assert (regularizer.weight, regularizer.every, regularizer.warmup) == (0.3, 2, 7)
    for key, value in block.items():
        assert key == "type" or getattr(regularizer, key) == value


# What it takes: shapes, parameterizations, schedules, networks


def rejection(action):
    """Return the message of an action's InputError, or None."""
    try:
        action()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("shape", [IMAGE, CLIP, (2, 1, 2, 2), (1, 1, 1), (5,)], ids=str)
@blocks
def test_a_shape_is_taken_or_rejected_with_one_message_before_and_at_the_first_step(block, shape):
    regularizer = built(block)
    rejections = [
        rejection(lambda: regularizer.check(LINEAR, (6, *shape))),
        rejection(
            lambda: losses_of([regularizer], shape=shape, network=lambda x, t, cond: torch.sin(x))
        ),
    ]

    assert rejections[0] == rejections[1]
    assert (rejections[0] is not None) == (
        block["type"] == "noise_constraint" and (len(shape) != 4 or shape[1] < 3)
    )


def schedules():
    for name in SCHEDULES.constructors:
        yield name, SCHEDULES.parse(name, "schedule").build()
    yield "zero_terminal", NoiseSchedule.linear(zero_terminal_snr=True)
    yield "short", NoiseSchedule.cosine(10)


CASES = [
    (name, schedule, kind)
    for name, schedule in schedules()
    for kind in PARAMETERIZATIONS
    if not (kind == "epsilon" and schedule.has_zero_terminal_snr)
]


@pytest.mark.parametrize(
    ("schedule", "kind"), [pytest.param(s, k, id=f"{name}-{k}") for name, s, k in CASES]
)
@blocks
def test_term_and_gradient_are_finite_at_both_ends_of_every_schedule(block, schedule, kind):
    network, last = Net(), schedule.num_timesteps - 1
    objective = term_alone(
        built(block), kind, schedule, torch.tensor([0, 0, 1, last - 1, last, last])
    )
    with objective.context():
        losses = objective(network, batch(), Rng(0, 0, range(6)))
        found = gradients(losses, network)

    assert bool(losses.total.isfinite())
    assert bool(found.isfinite().all())
    assert losses.total.item() >= 0


def unet(shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
        if len(shape) == 3:
            return UNet2DModel(
                sample_size=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                attention_head_dim=8,
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                **sizes,
            )
        return UNet3DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            cross_attention_dim=4,
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=4,
            **sizes,
        )


class Unet(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.unet, self.of_clips = unet(shape), len(shape) == 4

    def forward(self, x, t, cond):
        text = {"encoder_hidden_states": x.new_zeros(len(x), 1, 4)} if self.of_clips else {}
        return self.unet(x, t, **text).sample


@pytest.mark.parametrize(
    "shape", [(2, 8, 8), (2, 3, 8, 8)], ids=["UNet2DModel", "UNet3DConditionModel"]
)
@blocks
def test_a_diffusers_network_with_attention_has_finite_gradients(block, shape):
    regularizer, network = built(block), Unet(shape)
    try:
        regularizer.check(LINEAR, (4, *shape))
    except InputError:
        pytest.skip("not defined for this shape: it needs videos")
    x0 = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    objective = Objective(LINEAR, "v_prediction", regularizers=[regularizer])
    with objective.context():
        losses = objective(network, Batch(x0), Rng(0, 0, range(4)))
        losses.total.backward()

    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert losses.total.dtype == torch.float32
    assert len(found) > 50
    assert all(bool(g.isfinite().all()) for g in found)
