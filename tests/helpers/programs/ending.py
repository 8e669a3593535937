"""A program of several processes whose last act is to reduce tensors that nobody keeps."""

import atexit

import torch
import torch.distributed as dist

import difftrain.core.processes  # noqa: F401  waits at the end for the threads of the group


def reduce_some() -> None:
    """Reduce several tensors at once."""
    for work in [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(8)]:
        work.wait()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    atexit.register(reduce_some)
