"""Joining the processes that a launcher started, and leaving them."""

import torch
import torch.distributed as dist

from difftrain.core.console import hush_libraries
from difftrain.core.errors import ExitCode
from difftrain.core.processes import num_processes

_owns_process = False


def own_process() -> None:
    """Note that this process is one command of the library, and ends with it."""
    global _owns_process
    _owns_process = True


def owns_process() -> bool:
    """Return whether this process is one command of the library, and ends with it."""
    return _owns_process


def join_processes() -> torch.device:
    """Join the process group if a launcher started several processes.

    From then on information is shown by the main process alone, and collectives span all processes.

    Returns:
        This process's device.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    hush_libraries()
    # Accelerator reads this variable by itself, PartialState does not.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    return torch.device(state.device)


def leave_processes(code: int) -> int:
    """Take the process group down, if there is one.

    Args:
        code: The exit code of this process. After a success all processes leave together.

    Returns:
        The same code.
    """
    if num_processes() > 1:
        if code in (ExitCode.DONE, ExitCode.STOPPED):
            dist.barrier()
        dist.destroy_process_group()
    return code
