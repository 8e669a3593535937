"""A process group that serves the pretend device alone, as NCCL serves GPUs; gloo does the work."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllreduceOptions,
    BroadcastOptions,
    ProcessGroupGloo,
    ScatterOptions,
    _create_work_from_future,
)
from torch.distributed import distributed_c10d
from torch.futures import Future

from helpers import device

NAME = "pretend_nccl"


def finished(value: Any) -> Any:
    """Return a piece of work that is done, with its result."""
    future: Future[Any] = Future()
    future.set_result(value)
    return _create_work_from_future(future)


def refuse_others(tensors: list[Tensor]) -> None:
    """Refuse tensors that are not on the device, with the words of torch."""
    for tensor in tensors:
        if not device.is_on_device(tensor):
            kind = tensor.device.type
            raise RuntimeError(f"No backend type associated with device type {kind}")


class PretendGroup(dist.ProcessGroup):
    """See the module. Each collective copies to the host, calls gloo there, and copies back."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        super().__init__(rank, size)
        self.gloo = ProcessGroupGloo(store, rank, size, timeout)
        self.own_rank, self.num_ranks = rank, size

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return NAME

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices that it serves, by which torch chooses where pickled objects travel."""
        return [torch.device(device.NAME)]

    @property
    def group_name(self) -> str:
        """The name under which torch knows the group."""
        return str(distributed_c10d._world.pg_names[self])

    def _in_place(self, tensors: list[Tensor], run: Callable[[list[Tensor]], Any]) -> Any:
        refuse_others(tensors)
        host = [tensor.cpu() for tensor in tensors]
        run(host).wait()
        for tensor, value in zip(tensors, host, strict=True):
            tensor.copy_(value)
        return finished(tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce tensors in place."""
        given = opts or AllreduceOptions()
        return self._in_place(tensors, lambda host: self.gloo.allreduce(host, given))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Send the tensors of one process to all."""
        given = opts or BroadcastOptions()
        return self._in_place(tensors, lambda host: self.gloo.broadcast(host, given))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """Gather tensors from all processes."""
        refuse_others(inputs + outputs[0])
        host = [[output.cpu() for output in each] for each in outputs]
        self.gloo.allgather(host, [value.cpu() for value in inputs]).wait()
        for each, values in zip(outputs, host, strict=True):
            for output, value in zip(each, values, strict=True):
                output.copy_(value)
        return finished(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """Give every process its part of what one process has."""
        refuse_others(outputs + [value for each in inputs for value in each])
        host = [output.cpu() for output in outputs]
        parts = [[value.cpu() for value in each] for each in inputs]
        self.gloo.scatter(host, parts, opts or ScatterOptions()).wait()
        for output, value in zip(outputs, host, strict=True):
            output.copy_(value)
        return finished(outputs)

    def _allgather_base(self, output: Tensor, own: Tensor, opts: Any = None) -> Any:
        refuse_others([own, output])
        host = [torch.empty_like(own.cpu()) for _ in range(self.num_ranks)]
        self.gloo.allgather([host], [own.cpu()]).wait()
        output.copy_(torch.cat([part.flatten() for part in host]).view(output.shape))
        return finished([output])

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, opts: Any = None) -> Any:
        refuse_others([whole, output])
        host = whole.cpu()
        self.gloo.allreduce([host]).wait()
        if opts is not None and opts.reduceOp == dist.ReduceOp.AVG:
            host /= self.num_ranks
        own = host.flatten().chunk(self.num_ranks)[self.own_rank]
        output.copy_(own.view(output.shape))
        return finished([output])

    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all processes."""
        self.gloo.barrier().wait()
        return finished(None)


# Sharded tensors gather themselves with operators that look for a backend in C++, of which this
# group has none.


def group_of(name: Any) -> PretendGroup:
    """Return the group of a name."""
    found = distributed_c10d._resolve_process_group(name) if isinstance(name, str) else name
    assert isinstance(found, PretendGroup)
    return found


def all_reduce(value: Tensor, operation: str, name: Any) -> Tensor:
    """Return the sum, or the mean, over the processes."""
    total = value.clone()
    group_of(name).allreduce([total])
    return total / group_of(name).num_ranks if operation.lower() == "avg" else total


def all_gather(own: Tensor, size: int, name: Any) -> Tensor:
    """Return the tensors of all processes, one after the other."""
    output = own.new_empty((size * own.shape[0], *own.shape[1:]))
    group_of(name)._allgather_base(output, own.contiguous())
    return output


def reduce_scatter(whole: Tensor, operation: str, size: int, name: Any) -> Tensor:
    """Return this process's part of the sum, or of the mean, over the processes."""
    total = all_reduce(whole.contiguous(), operation, name)
    return total.chunk(size)[group_of(name).own_rank].clone()


OPERATORS = torch.library.Library("_c10d_functional", "IMPL")
OPERATORS.impl("all_reduce", all_reduce, "PrivateUse1")
OPERATORS.impl("all_gather_into_tensor", all_gather, "PrivateUse1")
OPERATORS.impl("reduce_scatter_tensor", reduce_scatter, "PrivateUse1")
OPERATORS.impl("wait_tensor", lambda tensor: tensor, "PrivateUse1")

dist.Backend.register_backend(NAME, PretendGroup, devices=[device.NAME])
