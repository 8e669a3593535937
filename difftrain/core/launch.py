"""Joining the processes that a launcher started, and leaving them."""

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from difftrain.core.console import hush_libraries
from difftrain.core.errors import ExitCode, InputError
from difftrain.core.processes import let_threads_end, num_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

_owns_process = False
# Sizes above 1 split a model in a way that this library does not know.
PARALLELISMS = {"TP": "tensor", "CP": "context", "SP": "sequence"}


def own_process() -> None:
    """Note that this process is one command of the library, and ends with it."""
    global _owns_process
    _owns_process = True


def owns_process() -> bool:
    """Return whether this process is one command of the library, and ends with it."""
    return _owns_process


def check_strategy(accelerator: "Accelerator | None" = None) -> None:
    """Refuse the ways of spreading a model over processes that do not work with this library.

    They are read from the environment, as `accelerate launch` sets it, before anything is built.

    Args:
        accelerator: An accelerator, if there is one already, which may have got them in Python.

    Raises:
        InputError: With what to use instead.
    """
    strategy = unsupported_strategy()
    if accelerator is not None:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            strategy = "FSDP 1"
    if strategy:
        raise InputError(
            f"launch: {strategy} does not work here. Use FSDP 2 for models that do not fit on one "
            "GPU (distributed_type: FSDP with fsdp_version: 2, as in recipes/accelerate/fsdp.yaml),"
            " or DDP (distributed_type: MULTI_GPU)."
        )


def unsupported_strategy() -> str:
    """Return the name of a strategy that the environment asks for and that does not work here."""
    from accelerate.utils import parse_flag_from_env as is_set

    if is_set("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        return "Megatron-LM"
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for short, name in PARALLELISMS.items():
            if os.environ.get(f"PARALLELISM_CONFIG_{short}_SIZE", "1") != "1":
                return f"{name} parallelism"
    if is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "2") != "2":
        return "FSDP 1"
    return ""


def join_processes() -> torch.device:
    """Join the process group if a launcher started several processes.

    From then on information is shown by the main process alone, and collectives span all processes.

    Returns:
        This process's device.

    Raises:
        InputError: If the launcher asks for a strategy that does not work here.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    check_strategy()
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
        let_threads_end()
    return code
