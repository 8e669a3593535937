"""What every entry point shares: exit codes, and one message for every way out."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from difftrain.distributed import is_main, num_processes, once_at_the_end
from difftrain.registry import InputError

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75


def join_processes() -> torch.device:
    """Find this process's place among those that a launcher started; from then on messages are told once. Returns its device."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    hush_libraries()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # Accelerator reads this variable, PartialState does not


def hush_libraries() -> None:
    """No progress bars and hints of the libraries between a command's own lines; their errors stay."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()


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
        message = error
        once_at_the_end(lambda: tell(message))
        return WRONG_INPUT


def leave(code: int) -> int:
    """Take the process group down, when there is one; returns the code."""
    if num_processes() > 1:
        if code in (DONE, STOPPED):
            dist.barrier()
        dist.destroy_process_group()
    return code
