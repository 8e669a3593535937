"""Values whose computation is dealt out over processes: each is computed by one of them, and all get the same numbers."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from difftrain.distributed import num_processes, on_all, share, sum_over_processes

T = TypeVar("T")


def dealt_values(items: Sequence[T], value: Callable[[T], float | Tensor], dealt: bool = True) -> Tensor:
    """value(item) of each item, float64 [n]: the same bits on any number of processes, as each number is one process's plus zeros.

    Collective, unless `dealt` is False or there is one process; `value` itself must not be. Its InputError is raised on all processes.
    """

    def own() -> Tensor:
        values = torch.zeros(len(items), dtype=torch.float64)
        for place in share(range(len(items))) if dealt else range(len(items)):
            values[place] = value(items[place])
        return values

    return sum_over_processes(on_all(own)) if dealt and num_processes() > 1 else own()
