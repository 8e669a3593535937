"""FSDP 2 in tests. accelerate turns it on for accelerators alone, but its code runs on CPUs too."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp._fully_shard import _fsdp_init

from difftrain.run import session


def swap_to_device(params: list[Any], buffers: list[Any], device: torch.device) -> None:
    """Move tensors in place, as FSDP 2 does.

    It sets their data, which torch refuses between the CPU and a device like the pretend one.
    """
    for tensor in [*params, *buffers]:
        if tensor.device != device:
            moved = tensor.detach().to(device)
            if isinstance(tensor, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, moved)


def sharding_accelerator(recipe: Any, make: Any = session.make_accelerator) -> Any:
    """Return the accelerator of a recipe, which shards what it prepares."""
    made = make(recipe)
    made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=False,
    )
    return made


@contextlib.contextmanager
def shards(is_on: bool = True) -> Iterator[None]:
    """Let runs within the context shard their weights, if `is_on`."""
    if not is_on:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "make_accelerator", sharding_accelerator)
        patched.setattr(_fsdp_init, "_move_states_to_device", swap_to_device)
        yield
