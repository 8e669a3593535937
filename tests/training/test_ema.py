"""The running average of weights against its closed form; its decays as functions of the step."""

import pytest
import torch
from helpers.support import assert_close
from torch import nn

from difftrain.core.errors import InputError
from difftrain.training.ema import ConstantDecay, HalfLife, WeightAverage


class Scalar(nn.Module):
    def __init__(self, value=0.0, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=dtype))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)

    def be(self, value):
        with torch.no_grad():
            self.w.fill_(value)


def averages(decay, values, batch_size=1):
    """Return the average after each of `values`, which begins with weights of 0."""
    module = Scalar()
    average = WeightAverage(module, decay)
    found = []
    for step, value in enumerate(values):
        module.be(value)
        average.update(step, batch_size)
        found.append(average.state_dict()["w"].item())
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_a_constant_decay_sums_the_weights_with_geometric_factors(decay):
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    expected = sum(
        (1 - decay) * decay ** (len(values) - 1 - i) * value for i, value in enumerate(values)
    )

    assert_close(averages(ConstantDecay(decay, warmup=False), values)[-1], expected, absolute=1e-14)


def test_the_average_of_constant_weights_approaches_them_as_one_minus_decay_to_the_steps():
    assert_close(
        averages(ConstantDecay(0.9, warmup=False), [1.0] * 20)[-1], 1 - 0.9**20, absolute=1e-14
    )


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (8, 0.5), (89, 90 / 99), (8990, 0.999), (10**6, 0.999)]
)
def test_the_warm_up_is_one_plus_step_over_ten_plus_step_until_it_reaches_the_decay(step, expected):
    assert_close(ConstantDecay(0.999)(step, 16), min(0.999, expected), absolute=1e-15)


def test_without_warm_up_the_decay_is_the_same_from_the_first_step():
    assert ConstantDecay(0.999, warmup=False)(0, 16) == 0.999


def test_after_the_images_of_a_half_life_half_of_the_old_average_is_left():
    decay = HalfLife(images=640.0, ramp=0.0)
    kept = 1.0
    for step in range(640 // 32):
        kept *= decay(step, 32)

    assert_close(kept, 0.5, absolute=1e-14)


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_a_half_life_gives_the_same_average_whatever_the_batch_size(batch_size):
    """Weights that change only every 32 images: what is kept of each stretch is 0.5^(32 / h)."""
    stretches = [1.0, -2.0, 3.0, 5.0]
    values = [value for value in stretches for _ in range(32 // batch_size)]
    expected = averages(HalfLife(images=50.0, ramp=0.0), stretches, batch_size=32)[-1]

    assert_close(
        averages(HalfLife(images=50.0, ramp=0.0), values, batch_size)[-1], expected, absolute=1e-14
    )


def test_the_half_life_ramps_up_as_a_share_of_the_images_seen():
    decay = HalfLife(images=1000.0, ramp=0.05)

    assert_close(decay(step=9, batch_size=100), 0.5 ** (100 / (0.05 * 1000)), absolute=1e-15)
    assert_close(
        decay(step=10**4, batch_size=100), 0.5 ** (100 / 1000), absolute=1e-15
    )  # the full half-life


def test_within_applied_the_module_holds_the_average_and_afterwards_its_own_weights_bit_for_bit():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.GroupNorm(1, 5))
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    average = WeightAverage(module, ConstantDecay(0.5))
    for p in module.parameters():
        p.data.mul_(1 / 3)
    third = {name: p.detach().clone() for name, p in module.named_parameters()}

    with average.applied():
        assert all(torch.equal(p, own[name]) for name, p in module.named_parameters())
    assert all(torch.equal(p, third[name]) for name, p in module.named_parameters())

    with pytest.raises(RuntimeError, match="inside"), average.applied():
        raise RuntimeError("inside")
    assert all(torch.equal(p, third[name]) for name, p in module.named_parameters())


def test_frozen_parameters_are_not_averaged():
    assert list(WeightAverage(Scalar(), ConstantDecay()).state_dict()) == ["w"]


def test_the_average_of_half_precision_weights_is_float32():
    module = Scalar(1.0, torch.bfloat16)
    average = WeightAverage(module, ConstantDecay(0.999, warmup=False))
    module.be(2.0)
    average.update(0, 1)

    assert average.state_dict()["w"].dtype == torch.float32
    assert_close(
        average.state_dict()["w"], [1.001], absolute=1e-6
    )  # lost in bfloat16, whose next number is 1.0078


def test_a_saved_average_continues_as_if_it_had_never_stopped():
    decay = ConstantDecay(0.9)
    straight = averages(decay, [1.0, 2.0, 3.0, 4.0])
    module = Scalar()
    first = WeightAverage(module, decay)
    for step, value in enumerate([1.0, 2.0]):
        module.be(value)
        first.update(step, 1)
    state = {name: value.clone() for name, value in first.state_dict().items()}

    second = WeightAverage(module, decay)
    second.load_state_dict(state)
    for step, value in enumerate([3.0, 4.0], start=2):
        module.be(value)
        second.update(step, 1)

    assert second.state_dict()["w"].item() == straight[-1]


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"decay": -0.1}])
def test_a_decay_outside_zero_and_one_is_refused(wrong):
    with pytest.raises(InputError, match="decay"):
        ConstantDecay(**wrong)
