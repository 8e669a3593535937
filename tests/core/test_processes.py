"""Collectives: the identity in a single process, and two real gloo processes."""

import pytest
import torch
import torch.distributed as dist
from helpers.places import PROGRAMS
from helpers.runs import launched, output_of
from helpers.several import on_processes

from difftrain.core.errors import InputError
from difftrain.core.processes import (
    barrier,
    gathered_from_processes,
    is_main,
    max_over_processes,
    mean_over_processes,
    num_processes,
    objects_from_processes,
    on_all,
    on_main,
    process_index,
    share,
    sum_over_processes,
)

REDUCTIONS = (sum_over_processes, mean_over_processes, max_over_processes)
ITEMS = [1.0, 0.1, 0.7, 1e-3, 5.0]


def test_alone_every_collective_is_the_identity_without_gradient():
    value = torch.tensor([1.0, 2.0], requires_grad=True)

    for reduce in REDUCTIONS:
        assert torch.equal(reduce(value), value)
        assert not reduce(value).requires_grad
    assert torch.equal(gathered_from_processes(value)[0], value)
    assert objects_from_processes({"a": 1}) == [{"a": 1}]
    assert list(share(ITEMS)) == ITEMS
    assert on_main(process_index) == on_all(process_index) == 0
    assert (num_processes(), process_index(), is_main()) == (1, 0, True)
    barrier()


def fail_on_the_second():
    if process_index() == 1:
        raise InputError("no such folder")


def message_of(action):
    try:
        action()
    except InputError as error:
        return str(error)
    return None


def collectives(rank, out):
    """Run by each of two processes: rank r holds (r + 1) (1, -2)."""
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    value = (rank + 1) * torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    reduced = [reduce(value) for reduce in REDUCTIONS]
    barrier()
    found = {
        "reduced": [r.tolist() for r in reduced],
        "own": value.tolist(),
        "gradient": any(r.requires_grad for r in reduced),
        "dtype": str(reduced[0].dtype),
        "place": (num_processes(), process_index(), is_main()),
        "gathered": [part.tolist() for part in gathered_from_processes(value)],
        "objects": objects_from_processes({"rank": rank}),
        "share": list(share("abcde")),
        "on main": on_main(lambda: f"by {process_index()}"),
        "on all": message_of(lambda: on_all(fail_on_the_second)),
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_reduce_gather_share_and_agree(tmp_path):
    on_processes(collectives, 2, str(tmp_path))

    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["reduced"] == [[3.0, -6.0], [1.5, -3.0], [2.0, -2.0]]
        assert found["own"] == [rank + 1.0, -2.0 * (rank + 1)]  # reduced in a copy, not in place
        assert not found["gradient"]
        assert found["dtype"] == "torch.float64"
        assert found["place"] == (2, rank, rank == 0)
        assert found["gathered"] == [[1.0, -2.0], [2.0, -4.0]]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["share"] == [["a", "c", "e"], ["b", "d"]][rank]
        assert found["on main"] == "by 0"
        assert found["on all"] == "no such folder"


@pytest.mark.distributed
def test_a_process_ends_well_though_the_threads_of_its_group_still_hold_tensors():
    process = launched([str(PROGRAMS / "ending.py")], processes=3)
    _, err = output_of(process)

    assert process.returncode == 0, err
