"""Sums over blocks on two processes: those of one, bit for bit, and failures of both."""

import pytest
import torch
from helpers.several import in_group, on_processes
from helpers.subjects import gaussian_subject
from helpers.support import Gaussian

from difftrain.diagnostics.exposure_bias import ExposureBias
from difftrain.diagnostics.gathering import by_block, in_order
from difftrain.evaluation.agreement import AgreedError
from difftrain.models.conditioning.classes import ClassConditioning

NUM, SIZE = 50, 8  # seven blocks, so that one process has a block more


def network(x, time, cond):
    return 0.5 * x


def sums(indices):
    x = torch.tensor(indices, dtype=torch.float64)
    return torch.stack([x.sin().sum(), x.cos().sum()])


def found_here():
    """Sums, and the exposure bias of a conditional model with unsorted classes."""
    of = gaussian_subject(
        Gaussian(),
        NUM,
        labels=torch.arange(NUM) % 12,
        conditioning=ClassConditioning(12, 12),
        block_size=SIZE,
    )
    places = [indices for indices, _ in in_order(NUM, (2,), SIZE, network, sums)]
    return by_block(NUM, (2,), SIZE, network, sums), places, ExposureBias(NUM, 3)(of)


def breaks_in_the_third_block(indices):
    if indices[0] == 2 * SIZE:
        raise ValueError("this block is broken")
    return sums(indices)


def on_one_process(rank, folder):
    """What one of two processes finds, into `folder`."""
    with in_group(rank, 2, folder):
        found = found_here()
        with pytest.raises(AgreedError, match="this block is broken"):
            by_block(NUM, (2,), SIZE, network, breaks_in_the_third_block)
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.distributed
def test_two_processes_find_the_bits_of_one(tmp_path):
    on_processes(on_one_process, 2, str(tmp_path))
    expected_sums, expected_places, expected = found_here()

    for rank in range(2):
        total, places, result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert torch.equal(total, expected_sums)
        assert places == expected_places
        assert result == expected


def test_blocks_come_in_order_with_their_sums():
    found = list(in_order(NUM, (2,), SIZE, network, sums))

    starts = range(0, NUM, SIZE)
    assert [indices for indices, _ in found] == [
        list(range(start, min(start + SIZE, NUM))) for start in starts
    ]
    assert all(torch.equal(numbers, sums(indices)) for indices, numbers in found)
    whole = sums(list(range(NUM)))
    torch.testing.assert_close(by_block(NUM, (2,), SIZE, network, sums), whole)
