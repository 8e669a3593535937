"""Sums, means and agreement over processes; each is the identity in a single process.

This is the one module that asks torch.distributed anything. A function that is called "collective"
must be called by every process, in the same order.
"""

import atexit
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from difftrain.core.errors import InputError

T = TypeVar("T")
ENDS = itertools.count()  # of this process's calls of once_at_the_end
ALARMS = itertools.count()
THREADS_END = 0.2  # seconds


def num_processes() -> int:
    """Return the world size."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return this process's rank."""
    return dist.get_rank() if num_processes() > 1 else 0


def is_main() -> bool:
    """Return whether this is the process of rank 0, which writes files and messages."""
    return process_index() == 0


def sum_over_processes(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over processes. Collective.

    Args:
        value: Numbers of one shape on every process.
        group: The processes; None takes all of them.

    Returns:
        The sum, of the same shape and on the same device. No gradient passes through it.
    """
    return _all_reduced(value, dist.ReduceOp.SUM, group)


def mean_over_processes(value: Tensor) -> Tensor:
    """Average a tensor over processes. Collective; see `sum_over_processes`."""
    return sum_over_processes(value) / num_processes()


def max_over_processes(value: Tensor) -> Tensor:
    """Take the elementwise maximum over processes. Collective; see `sum_over_processes`."""
    return _all_reduced(value, dist.ReduceOp.MAX)


def _all_reduced(
    value: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None
) -> Tensor:
    if num_processes() == 1:
        return value.detach()
    place = communication_device(value.device, group)
    # A copy, since the reduction is in place
    reduced = value.detach().to(place, copy=True).contiguous()
    dist.all_reduce(reduced, op=op, group=group)
    return reduced.to(value.device)


def gathered_from_processes(value: Tensor) -> list[Tensor]:
    """Gather a tensor of one shape from every process. Collective.

    Returns:
        The tensors in the order of ranks, without gradient.
    """
    if num_processes() == 1:
        return [value.detach()]
    own = value.detach().to(communication_device(value.device)).contiguous()
    parts = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(parts, own)
    return [part.to(value.device) for part in parts]


def objects_from_processes(value: T) -> list[T]:
    """Gather a picklable object from every process, in the order of ranks. Collective."""
    if num_processes() == 1:
        return [value]
    found: list[Any] = [None] * num_processes()
    dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until every process is here. Collective."""
    if num_processes() > 1:
        dist.barrier()


def once_at_the_end(action: Callable[[], None], patience: float = 10.0) -> None:
    """Run an action that explains why the program ends, on the first process that comes here.

    A launcher ends all processes as soon as one exits with an error, so none may leave while
    another one is still explaining. This is not a collective: some failing processes may never come
    here.

    Args:
        action: What the first process does.
        patience: Seconds for which the other processes wait for it.
    """
    if num_processes() == 1:
        action()
        return
    store, end = dist.distributed_c10d._get_default_store(), f"difftrain/end/{next(ENDS)}"
    if store.add(end, 1) == 1:
        action()
        store.set(f"{end}/told", "1")
    else:
        # The process that explains, and the store with it, may be gone by now.
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.wait([f"{end}/told"], timedelta(seconds=patience))


class Alarm:
    """Lets the other processes know that one has failed; nobody waits for it.

    Every process constructs it, in the same order. A single process needs none, and hears none.
    """

    def __init__(self) -> None:
        self.key = f"difftrain/alarm/{next(ALARMS)}"

    def ring(self) -> None:
        """Tell all processes."""
        if num_processes() > 1:
            dist.distributed_c10d._get_default_store().add(self.key, 1)

    def is_ringing(self) -> bool:
        """Return whether any process has told the others."""
        if num_processes() == 1:
            return False
        return bool(dist.distributed_c10d._get_default_store().add(self.key, 0) > 0)


def communication_device(
    wanted: torch.device, group: dist.ProcessGroup | None = None
) -> torch.device:
    """Return where a tensor must lie for the process group: NCCL, for one, serves GPUs alone.

    Args:
        wanted: Where the tensor lies.
        group: The processes; None takes all of them.

    Returns:
        `wanted` if the group serves it, else the CPU if the group serves that, else the current
        device of the type that it serves.
    """
    # Such as "cuda:nccl", or "cpu:gloo,cuda:nccl"
    backends = dist.get_backend_config(group).split(",")
    served = [backend.partition(":")[0] for backend in backends]
    if wanted.type in served:
        return wanted
    if "cpu" in served:
        return torch.device("cpu")
    kind = served[0]
    return torch.device(kind, torch.get_device_module(kind).current_device())


def share(items: Iterable[T]) -> Iterator[T]:
    """Take this process's share, every k-th one, of items that all processes have in one order."""
    return itertools.islice(items, process_index(), None, num_processes())


def on_main(action: Callable[[], T]) -> T:
    """Run an action on the main process. Collective.

    Args:
        action: What the main process does. Its result must be picklable.

    Returns:
        The result, on every process.

    Raises:
        InputError: On every process, if the action raises it.
    """
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
    return cast(T, result)


def on_all(action: Callable[[], T]) -> T:
    """Run an action on every process. Collective.

    Args:
        action: What each process does. It must not itself be collective.

    Returns:
        This process's own result.

    Raises:
        InputError: On every process, if the action raises it on any of them.
    """
    if num_processes() == 1:
        return action()
    result, problem = None, None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    first = next((found for found in objects_from_processes(problem) if found is not None), None)
    if first is not None:
        raise InputError(first)
    return cast(T, result)


def let_threads_end() -> None:
    """Let the threads of the process group drop what they have sent, before the interpreter ends.

    A thread of gloo keeps the tensors of a collective for a moment after it is done. To drop one
    that Python made it needs the interpreter's lock. If the interpreter is ending by then, the
    process aborts ("terminate called without an active exception"), or waits for ever. Here the
    lock is free.
    """
    time.sleep(THREADS_END)


@atexit.register
def _at_exit() -> None:
    if num_processes() > 1:
        let_threads_end()
