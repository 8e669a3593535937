"""Tiny runs: a recipe of the digits, and a network of some thousand parameters."""

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from difftrain.recipe.reading import load
from difftrain.run import diagnosis
from difftrain.run.session import TrainingRun
from difftrain.training import checkpoint
from difftrain.training.trainer import Trainer
from helpers.tiny_networks import UNET, UNET3D

torch.set_num_threads(1)  # for networks this small a second thread does nothing but wait
diagnosis.QUICK.update(num=24, num_timesteps=4)  # the held-out gap at the end of every scored run

HANG = 1800.0  # seconds after which a process counts as hanging; nothing else depends on it

CLIPS = {
    "model": {"type": "unet3d_condition", "config": UNET3D},
    "data": {"type": "digit_clips", "num_frames": 3, "size": 12},
    "transform": {"resolution": 12, "channels": 1, "resize": "none"},
    "label_dropout": 0.0,
    "training__batch_size": 2,
}  # changes of the tiny recipe: clips of three frames instead of digits


def tiny(folder: Path, **changes: Any) -> Path:
    """Write a recipe file into `folder`, whose run goes to folder/run.

    Args:
        folder: Where the file goes.
        changes: Whole blocks, or keys within one: training__steps=4.
    """
    blocks: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"type": "unet2d", "config": dict(UNET)},
        "schedule": {"type": "linear", "num_timesteps": 50},
        "parameterization": "epsilon",
        "data": {"type": "digits", "part": "train"},
        "transform": {"resolution": 8, "channels": 1, "resize": "none"},
        "label_dropout": 0.2,
        "training": {
            "steps": 6,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 100,
            "num_sampled": 2,
        },
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "sampling": {"sampler": {"type": "ddim", "steps": 2}, "block_size": 4},
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        place = blocks
        for name in above:
            place = place.setdefault(name, {})
        place[last] = copy.deepcopy(value)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(blocks, sort_keys=False))
    return file


def trainer(file: Path, *overrides: str) -> Trainer:
    """Return the recipe's trainer in this process: its folder is there, nothing is trained yet."""
    run = TrainingRun(load(file, overrides), accept_changes=True)
    run.write_beginning()
    return run.trainer()


def trained(file: Path, *overrides: str) -> Trainer:
    """Return the trainer after it has resumed and run to its end."""
    made = trainer(file, *overrides)
    made.resume()
    assert made.run()
    return made


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of the network's parameters by name."""
    return {name: value.detach().clone() for name, value in trainer.bare.named_parameters()}


def saved(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Read everything in a checkpoint of the run in `folder`; None is its latest step."""
    checkpoints = folder / "checkpoints"
    place = checkpoint.latest(checkpoints)
    if step is not None:
        place = checkpoint.folder_of(checkpoints, step)
    assert place is not None
    file = place / "ema.safetensors"
    average = load_file(file) if file.exists() else None
    return {
        "model": load_file(place / "model.safetensors"),
        "ema": average,
        "state": torch.load(place / "state.pt", weights_only=True, map_location="cpu"),
        "trainer": json.loads((place / "trainer.json").read_text()),
    }


def lines(file: Path) -> list[dict[str, Any]]:
    """Read the records of a log without their wall-clock fields."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "wall"} for record in records]


def assert_identical(one: Any, other: Any, path: str = "") -> None:
    """Compare nested data, bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), (
            f"{path}: off by up to {(one.double() - other.double()).abs().max().item():.3g}"
        )
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{path}.{i}")
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other), f"{path}: {one!r} != {other!r}"
    else:
        assert one == other, f"{path}: {one!r} != {other!r}"


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference between tensors of the same names."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@contextlib.contextmanager
def terminations_fail() -> Iterator[None]:
    """Make a SIGTERM that no run handles an error within the context, not the end of all tests."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError("no run handled the signal")

    before = signal.signal(signal.SIGTERM, fail)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(**more: str | None) -> dict[str, str]:
    """Return the environment of processes that tests start: one thread, no GPU."""
    variables = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    return {name: value for name, value in variables.items() if value is not None}


def launched(
    command: list[str], processes: int | None = None, **more: str | None
) -> subprocess.Popen:
    """Start a Python command in a process of its own, or in several under torchrun.

    Args:
        command: The arguments of python.
        processes: World size; None starts one process without a launcher.
        more: Further environment variables; None removes one.
    """
    launcher: list[str] = []
    if processes is not None:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", str(free_port()), "--max_restarts", "0"]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(*arguments: str, processes: int | None = None, **more: str) -> subprocess.Popen:
    """Start `python -m difftrain.train` with these arguments."""
    return launched(["-m", "difftrain.train", *arguments], processes, **more)


def ran(*arguments: str, processes: int | None = None, **more: str) -> subprocess.CompletedProcess:
    """Run `python -m difftrain.train` to its end."""
    process = start(*arguments, processes=processes, **more)
    out, err = output_of(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_of(process: subprocess.Popen) -> tuple[str, str]:
    """Return what a process wrote, when it has ended.

    A process that hangs is ended, with the processes that it started.
    """
    try:
        return process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        process.terminate()
        _, err = process.communicate()
        raise AssertionError(f"did not end within {HANG:.0f} seconds:\n{err}") from None


def free_port() -> int:
    """Return a port that is free now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_line(file: Path, process: subprocess.Popen, num: int = 1) -> None:
    """Wait until a log has that many lines, or the process that writes it has ended."""
    until = time.monotonic() + HANG
    while process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= num:
            return
        assert time.monotonic() < until, f"no {num} lines in {file} within {HANG:.0f} seconds"
        time.sleep(0.05)
