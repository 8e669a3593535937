"""Several processes of one test, forked from a server that has imported the library once.

A process of its own imports torch for seconds. The server does so once for all tests of a process;
what it forks has no threads, no process group and no state of the tests.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

from helpers.runs import HANG, environment, free_port

PRELOADED = [
    "torch",
    "torchmetrics",
    "transformers",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_3d_condition",
    "diffusers.schedulers.scheduling_ddpm",
    "difftrain.run.session",
    "difftrain.run.diagnosis",
    "difftrain.run.evaluating",
    "difftrain.evaluation.evaluator",
]


def on_processes(work: Callable[..., None], num: int, *arguments: Any) -> None:
    """Call `work(rank, *arguments)` on each of several processes, and wait for all of them.

    Args:
        work: A function of a module.
        num: Number of processes.
        arguments: Further arguments.

    Raises:
        torch.multiprocessing.ProcessException: If one of them fails.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    running = torch.multiprocessing.start_processes(
        work, args=arguments, nprocs=num, join=False, start_method="forkserver"
    )
    until = time.monotonic() + HANG
    while not running.join(timeout=5):
        if time.monotonic() > until:
            for process in running.processes:
                process.kill()
            raise AssertionError(f"did not end within {HANG:.0f} seconds")


@contextlib.contextmanager
def in_group(rank: int, num: int, folder: Path | str) -> Iterator[None]:
    """Join the processes that `on_processes` has started, and leave them at the end.

    Args:
        rank: The number of this process.
        num: Number of processes.
        folder: An empty folder in which they meet.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def run_program(
    program: Path | str, *arguments: str | Path, num: int = 1, **more: str | None
) -> None:
    """Run a program on several processes, with the environment that torchrun would give them.

    Args:
        program: A file, or the name of a module.
        arguments: Its arguments.
        num: Number of processes; one gets no environment of a launcher.
        more: Further environment variables; None removes one.

    Raises:
        AssertionError: If one of them fails, with what it wrote on standard error.
    """
    variables = environment(**more)
    if num > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables |= {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), **place}
    with tempfile.TemporaryDirectory() as written:
        given = [str(argument) for argument in arguments]
        try:
            on_processes(run_here, num, str(program), given, variables, written)
        except torch.multiprocessing.ProcessException as error:
            texts = [file.read_text() for file in sorted(Path(written).iterdir())]
            raise AssertionError("\n".join([str(error), *texts])) from error


def run_here(
    rank: int, program: str, arguments: Sequence[str], variables: Mapping[str, str], written: str
) -> None:
    """Run a program in this process, as one of several, with its output in a file.

    Args:
        rank: The number of the process.
        program: A file, or the name of a module.
        arguments: Its arguments.
        variables: The environment.
        written: The folder for the output.
    """
    os.environ.clear()
    os.environ.update(variables)
    if "WORLD_SIZE" in variables:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(f"{written}/{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [program, *arguments]
    torch.set_num_threads(1)
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    kept: Any = None  # the program's objects stay alive
    code: Any = 0
    try:
        kept = run(program, run_name="__main__")
    except SystemExit as error:
        kept, code = error, error.code
    sys.stdout.flush()
    sys.stderr.flush()
    # Without taking objects down: that of a network under DDP may wait for gloo's threads for ever.
    os._exit(int(code or 0) if kept is not None else 1)
