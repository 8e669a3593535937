"""Sums over processes: the identity when alone, and two real gloo processes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from difftrain import distributed


def test_alone_every_reduction_is_the_identity_without_gradient():
    value = torch.tensor([1.0, 2.0], requires_grad=True)

    for reduce in (distributed.sum_over_processes, distributed.mean_over_processes, distributed.max_over_processes):
        assert torch.equal(reduce(value), value)
        assert not reduce(value).requires_grad
    assert (distributed.num_processes(), distributed.process_index(), distributed.is_main()) == (1, 0, True)
    distributed.barrier()


def reductions(rank, port, out):
    """Run by each of two processes: rank r holds (r + 1) (1, -2)."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    value = (rank + 1) * torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    reduced = [f(value) for f in (distributed.sum_over_processes, distributed.mean_over_processes, distributed.max_over_processes)]
    distributed.barrier()
    found = {
        "reduced": [r.tolist() for r in reduced],
        "own": value.tolist(),
        "gradient": any(r.requires_grad for r in reduced),
        "dtype": str(reduced[0].dtype),
        "place": (distributed.num_processes(), distributed.process_index(), distributed.is_main()),
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_reduce_to_sum_mean_and_maximum(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    mp.spawn(reductions, (port, str(tmp_path)), nprocs=2)

    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["reduced"] == [[3.0, -6.0], [1.5, -3.0], [2.0, -2.0]]
        assert found["own"] == [rank + 1.0, -2.0 * (rank + 1)]  # reduced in a copy, not in place
        assert not found["gradient"]
        assert found["dtype"] == "torch.float64"
        assert found["place"] == (2, rank, rank == 0)
