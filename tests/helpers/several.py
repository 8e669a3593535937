"""Several processes of one test, forked from a server that has imported the library once."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

PRELOADED = ["torch", "torchmetrics", "difftrain.run.session", "difftrain.evaluation.evaluator"]


def on_processes(work: Callable[..., None], num: int, *arguments: Any) -> None:
    """Call `work(rank, *arguments)` on each of several processes, and wait for all of them.

    A process of its own imports torch for seconds. The server does so once for all tests of a
    process; what it forks has no threads, no process group and no state of the tests.

    Args:
        work: A function of a module.
        num: Number of processes.
        arguments: Further arguments.

    Raises:
        torch.multiprocessing.ProcessRaisedException: If one of them raises.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        work, args=arguments, nprocs=num, start_method="forkserver"
    )
