"""Digests and checksums against sums by hand, and every change that they must notice."""

import pytest
import torch

from difftrain.core import digests
from difftrain.core.digests import checksum, digest, weights_digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_the_sum_of_bits_by_their_places(dtype, monkeypatch):
    values = (10 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    bits = values.reshape(-1).view(digests.INTEGERS[values.element_size()]).tolist()

    expected = sum(bit * place for place, bit in enumerate(bits, start=1)) % 2**64

    assert checksum(values) == expected
    monkeypatch.setattr(digests, "CHUNK", 4)
    assert checksum(values) == expected


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


def last_bit(model):
    model[0].weight.data[0, 0].mul_(1 + 2**-20)
    return model


def swapped(model):
    model[0].weight.data = model[0].weight.data.flip(0)
    return model


def other_buffer(model):
    model[1].running_mean.add_(1)
    return model


def wider(model):
    return model.double()


def longer(model):
    return torch.nn.Sequential(*model, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("changed", [last_bit, swapped, other_buffer, wider, longer])
def test_every_change_of_weights_changes_their_digest(changed):
    assert weights_digest(network().state_dict()) == weights_digest(network().state_dict())
    assert weights_digest(changed(network()).state_dict()) != weights_digest(network().state_dict())


def test_a_digest_depends_on_the_order_of_its_parts_and_on_dtype_and_shape_of_tensors():
    x = torch.zeros(2, 3)
    found = [
        digest("a", "b"),
        digest("b", "a"),
        digest("ab"),
        digest("a", None, "b"),
        digest(x),
        digest(x.T),
        digest(x.double()),
        digest(x + 1),
    ]

    assert len(set(found)) == len(found)
    assert all(len(one) == 16 for one in found)
    assert digest(x.T.contiguous()) == digest(x.T)
