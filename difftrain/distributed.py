"""Sums, means and agreement over processes; the identity when alone. The one place that asks torch.distributed anything."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from difftrain.registry import InputError

T = TypeVar("T")
ENDS = itertools.count()  # of once_at_the_end's calls in this process


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def is_main() -> bool:
    return process_index() == 0


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of `value` over processes, same shape. No gradient passes: use it on detached numbers."""
    if num_processes() == 1:
        return value.detach()
    total = value.detach().clone().to(communication_device())
    dist.all_reduce(total)
    return total.to(value.device)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of `value` over processes, same shape. No gradient passes."""
    return sum_over_processes(value) / num_processes()


def max_over_processes(value: Tensor) -> Tensor:
    """Elementwise maximum of `value` over processes, same shape. No gradient passes."""
    if num_processes() == 1:
        return value.detach()
    largest = value.detach().clone().to(communication_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.to(value.device)


def gathered_from_processes(value: Tensor) -> list[Tensor]:
    """`value` of every process, which must have one shape, in the order of the processes. No gradient passes."""
    if num_processes() == 1:
        return [value.detach()]
    own = value.detach().to(communication_device()).contiguous()
    parts = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(parts, own)
    return [part.to(value.device) for part in parts]


def barrier() -> None:
    if num_processes() > 1:
        dist.barrier()


def once_at_the_end(action: Callable[[], None], patience: float = 10.0) -> None:
    """Run `action`, which tells why the program ends, on the first process that comes here; the others wait for it, `patience` seconds.

    A launcher ends all processes as soon as one exits with an error, so none may leave while another is telling. No collective: of
    processes that fail, some may never come here.
    """
    if num_processes() == 1:
        action()
        return
    store, end = dist.distributed_c10d._get_default_store(), f"difftrain/end/{next(ENDS)}"
    if store.add(end, 1) == 1:
        action()
        store.set(f"{end}/told", "1")
    else:
        with contextlib.suppress(dist.DistError, RuntimeError):  # the process that told, or the store with it, is gone
            store.wait([f"{end}/told"], timedelta(seconds=patience))


def communication_device() -> torch.device:
    """Where tensors must lie for the process group's backend: NCCL moves only what is on a GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def share(items: Iterable[T]) -> Iterator[T]:
    """This process's share of items that every process has in one order: each k-th one."""
    return itertools.islice(items, process_index(), None, num_processes())


def on_main(action: Callable[[], T]) -> T:
    """The result of `action` run on the main process, on all processes; its InputError is raised on all of them."""
    if num_processes() == 1:
        return action()
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [(action(), None)]
        except InputError as error:
            outcome = [(None, str(error))]
    dist.broadcast_object_list(outcome)
    result, problem = outcome[0]
    if problem is not None:
        raise InputError(problem)
    return result


def on_all(action: Callable[[], T]) -> T:
    """The result of `action` run on every process; an InputError that any of them meets is raised on all of them."""
    if num_processes() == 1:
        return action()
    result, problem = None, None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    problems: list[Any] = [None] * num_processes()
    dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise InputError(first)
    return cast(T, result)
