"""What every entry point shares: exit codes, one message for every way out, and work that the main process does for all."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from difftrain.distributed import is_main, num_processes
from difftrain.registry import InputError

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75
T = TypeVar("T")


def join_processes() -> torch.device:
    """Find this process's place among those that a launcher started; from then on messages are told once. Returns its device."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # Accelerator reads this variable, PartialState does not


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


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)


def tell(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def guarded(action: Callable[[], int]) -> int:
    """The exit code of `action`; wrong input becomes one message, printed once, and code 2."""
    try:
        return action()
    except InputError as error:
        if is_main():
            tell(error)
        return WRONG_INPUT


def leave(code: int) -> int:
    """Take the process group down, when there is one; returns the code."""
    if num_processes() > 1:
        if code in (DONE, STOPPED):
            dist.barrier()
        dist.destroy_process_group()
    return code
