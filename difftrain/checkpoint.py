"""What is saved, where, and how the latest is found.

A checkpoint is written beside its place and renamed when it is whole; a marker inside says so. Older ones go only after
the new one stands. It holds everything that the rest of the run depends on and that cannot be computed: weights, their
average, optimizer, the regularizers' state, and the trainer's own few numbers.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from difftrain.distributed import barrier, is_main
from difftrain.registry import InputError

MARKER = "complete"
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:07d}"


def whole(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step-*/{MARKER}"))


def latest(checkpoints: Path) -> Path | None:
    return next(reversed(whole(checkpoints)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def write(checkpoints: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make step's checkpoint with `fill(folder)`, whole or not at all. Called by the main process."""
    target = folder_of(checkpoints, step)
    partial = checkpoints / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        (partial / MARKER).write_text(f"{step}\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own errors
        shutil.rmtree(partial, ignore_errors=True)
        intact = latest(checkpoints)
        raise InputError(
            f"the checkpoint of step {step} could not be written to {target}: {error}. "
            f"{'The latest whole one is ' + str(intact) if intact else 'There is no earlier one'}. "
            "Make room (or point output: to another disk) and run the same command again."
        ) from error
    return target


def rotate(checkpoints: Path, keep: int, protected: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those of the protected steps, and what crashes left half-written."""
    for path in whole(checkpoints)[:-keep]:
        if step_of(path) not in protected:
            (path / MARKER).unlink()  # first: a half-removed checkpoint is no checkpoint
            shutil.rmtree(path)
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path)


class Snapshot:
    """The state of a run's parts, gathered to the CPU on every process and written by the main one."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Any | None, others: dict[str, Any]):
        self.model, self.optimizer, self.average, self.others = model, optimizer, average, others
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())

    def save(self, checkpoints: Path, step: int, state: dict[str, Any], recipe: str) -> None:
        """Collective: every process calls it, and returns when the checkpoint is whole, or raises."""
        model, optimizer = self._gathered()
        average = {name: full(value) for name, value in self.average.state_dict().items()} if self.average else None
        others = {name: other.state_dict() for name, other in self.others.items()}

        def fill(folder: Path) -> None:
            save_file({name: value.contiguous() for name, value in model.items()}, folder / "model.safetensors")
            if average is not None:
                save_file({name: value.contiguous() for name, value in average.items()}, folder / "ema.safetensors")
            torch.save({"optimizer": optimizer, **others}, folder / "state.pt")
            (folder / "trainer.json").write_text(json.dumps({"step": step, **state}))
            (folder / "recipe.yaml").write_text(recipe)

        if is_main():
            write(checkpoints, step, fill)
        barrier()

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore every part from a checkpoint; returns the trainer's own state."""
        model = load_file(checkpoint / "model.safetensors")
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if self.sharded:
            dcp.set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=saved["optimizer"], options=FULL)
        else:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            shards = load_file(checkpoint / "ema.safetensors")
            like = self.average.state_dict()
            self.average.load_state_dict({name: as_sharded(value, like[name]) for name, value in shards.items()})
        for name, other in self.others.items():
            other.load_state_dict(saved[name])
        return trainer_state(checkpoint)

    def _gathered(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.sharded:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}, self.optimizer.state_dict()
        model, optimizer = dcp.get_state_dict(self.model, self.optimizer, options=FULL)
        return model, optimizer  # type: ignore[return-value]


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own numbers: step, best_step, best_value."""
    return json.loads((checkpoint / "trainer.json").read_text())


def full(value: Tensor) -> Tensor:
    """The whole tensor on the CPU, of one that may be sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """`value` laid out over processes as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(module: nn.Module, checkpoint: Path, averaged: bool) -> str:
    """Load a checkpoint's weights, averaged ones if it has them and they are asked for; returns which ("ema" or "model")."""
    weights = load_file(checkpoint / "model.safetensors")
    has_average = (checkpoint / "ema.safetensors").exists()
    if averaged and has_average:
        weights |= load_file(checkpoint / "ema.safetensors")
    module.load_state_dict(weights)
    return "ema" if averaged and has_average else "model"
