"""Tiny runs for the tests of the trainer: a recipe of the digits and a network of some thousand parameters."""

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

from difftrain import checkpoint, diagnose, recipe, runfolder
from difftrain.train import Run

torch.set_num_threads(1)  # for networks this small a second thread does nothing but wait
diagnose.QUICK.update(num=24, num_timesteps=4)  # the held-out gap at the end of every scored run

UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": 8,
    "num_class_embeds": 11,
}

UNET3D = {
    "sample_size": 12, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock3D"] * 2, "up_block_types": ["UpBlock3D"] * 2, "attention_head_dim": 4, "cross_attention_dim": 4,
}
CLIPS = {
    "model": {"type": "unet3d_condition", "config": UNET3D}, "data": {"type": "digit_clips", "num_frames": 3, "size": 12},
    "transform": {"resolution": 12, "channels": 1, "resize": "none"}, "label_dropout": 0.0, "training__batch_size": 2,
}  # changes of the tiny recipe: clips of three frames instead of digits


def tiny(folder: Path, **changes: Any) -> Path:
    """A recipe file in `folder`, whose run goes to folder/run. changes: whole blocks, or keys within one as training__steps=4."""
    blocks: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"type": "unet2d", "config": dict(UNET)},
        "schedule": {"type": "linear", "num_timesteps": 50},
        "parameterization": "epsilon",
        "data": {"type": "digits", "part": "train"},
        "transform": {"resolution": 8, "channels": 1, "resize": "none"},
        "label_dropout": 0.2,
        "training": {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 100, "num_sampled": 2},
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


def trainer(file: Path, *overrides: str) -> Any:
    """The recipe's trainer in this process, its folder made, nothing trained yet."""
    run = Run(recipe.load(file, overrides), accept_changes=True)
    runfolder.write_atomically(run.folder / "recipe.yaml", run.recipe.to_yaml())
    return run.trainer()


def trained(file: Path, *overrides: str) -> Any:
    """The trainer after it has resumed and run to its end."""
    made = trainer(file, *overrides)
    made.resume()
    assert made.run()
    return made


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.bare.named_parameters()}


def saved(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Everything in a checkpoint (default: the latest) of the run in `folder`."""
    checkpoints = folder / "checkpoints"
    place = checkpoint.latest(checkpoints) if step is None else checkpoint.folder_of(checkpoints, step)
    assert place is not None
    average = place / "ema.safetensors"
    return {
        "model": load_file(place / "model.safetensors"), "ema": load_file(average) if average.exists() else None,
        "state": torch.load(place / "state.pt", weights_only=True), "trainer": json.loads((place / "trainer.json").read_text()),
    }


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a log without their wall-clock fields."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "wall"} for record in records]


def assert_identical(one: Any, other: Any, path: str = "") -> None:
    """Equal bit for bit, whatever is nested."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), f"{path}: off by up to {(one.double() - other.double()).abs().max().item():.3g}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{path}.{i}")
    else:
        assert one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other)), f"{path}: {one!r} != {other!r}"


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@contextlib.contextmanager
def terminations_fail() -> Iterator[None]:
    """Within: a SIGTERM that the run does not take is an error here, rather than the end of all tests."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError("nobody took the signal")

    before = signal.signal(signal.SIGTERM, fail)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(**more: str) -> dict[str, str]:
    """For processes of their own: one thread, no GPU."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def launched(command: list[str], processes: int | None = None, **more: str) -> subprocess.Popen:
    """A Python command in a process of its own, or in several under torchrun."""
    launcher = [] if processes is None else [
        "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port()), "--max_restarts", "0",
    ]
    return subprocess.Popen(
        [sys.executable, *launcher, *command], env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start(*arguments: str, processes: int | None = None, **more: str) -> subprocess.Popen:
    """The real command, `difftrain.train` with these arguments."""
    return launched(["-m", "difftrain.train", *arguments], processes, **more)


def ran(*arguments: str, processes: int | None = None, **more: str) -> subprocess.CompletedProcess:
    process = start(*arguments, processes=processes, **more)
    out, err = output_of(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_of(process: subprocess.Popen) -> tuple[str, str]:
    """What it wrote, when it has ended; one that hangs is ended, with the processes that it started."""
    try:
        return process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()
        _, err = process.communicate()
        raise AssertionError(f"did not end within 180 seconds:\n{err}") from None


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_line(file: Path, process: subprocess.Popen, num: int = 1) -> None:
    """Until a log has that many lines, or the process that writes it has ended."""
    until = time.monotonic() + 120
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= num):
        assert time.monotonic() < until
        time.sleep(0.05)
