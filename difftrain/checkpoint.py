"""What is saved, where, and how the latest is found.

A checkpoint is written beside its place and renamed when it is whole; a marker inside says so. Older ones go only after
the new one stands. It holds everything that the rest of the run depends on and that cannot be computed: weights, their
average, optimizer, the regularizers' state, and the trainer's own few numbers.
"""

import json
import os
import pickle
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

from difftrain.distributed import on_main
from difftrain.registry import InputError

MARKER = "complete"
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:07d}"


def whole(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path.parent for path in checkpoints.glob(f"step-*/{MARKER}")]
    return sorted((path for path in found if path.name.removeprefix("step-").isdigit()), key=step_of)


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
            remove(target)
        os.replace(partial, target)
    except OSError as error:
        intact = latest(checkpoints)
        raise InputError(
            f"the checkpoint of step {step} could not be written to {target}: {error}. "
            f"{'The latest whole one is ' + str(intact) if intact else 'There is no earlier one'}. "
            "Make room (or point output: to another disk) and run the same command again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def remove(checkpoint: Path) -> None:
    """Renamed first: a half-removed checkpoint is no checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def rotate(checkpoints: Path, keep: int, protected: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those of the protected steps, and what crashes left half-written."""
    for path in whole(checkpoints)[:-keep]:
        if step_of(path) not in protected:
            remove(path)
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path)


class Snapshot:
    """The state of a run's parts, gathered to the CPU on every process and written by the main one."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Any | None, others: dict[str, Any]):
        self.model, self.optimizer, self.average, self.others = model, optimizer, average, others
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())

    def save(self, checkpoints: Path, step: int, state: dict[str, Any], recipe: str) -> None:
        """Collective: every process calls it, and returns when the checkpoint is whole, or raises InputError."""
        model, optimizer = self._gathered()
        average = {name: full(value) for name, value in self.average.state_dict().items()} if self.average else None
        others = {name: other.state_dict() for name, other in self.others.items()}

        def fill(folder: Path) -> None:
            save_tensors(model, folder / "model.safetensors")
            if average is not None:
                save_tensors(average, folder / "ema.safetensors")
            save_objects({"optimizer": optimizer, **others}, folder / "state.pt")
            (folder / "trainer.json").write_text(json.dumps({"step": step, **state}))
            (folder / "recipe.yaml").write_text(recipe)

        on_main(lambda: write(checkpoints, step, fill))

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore every part from a checkpoint; returns the trainer's own state. One that does not fit is refused."""
        try:
            return self._load(checkpoint)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")[:500]
            raise InputError(f"{checkpoint} cannot be resumed by this recipe: {reason}. Write the recipe that it was trained with, "
                             "start over with --fresh, or remove the checkpoint to go on from the one before.") from error

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        model = load_file(checkpoint / "model.safetensors")
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if self.sharded:
            dcp.set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=saved["optimizer"], options=FULL)
        else:
            load_trained(self.model, model)
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
            return {name: value.detach().cpu() for name, value in trained_state(self.model).items()}, self.optimizer.state_dict()
        model, optimizer = dcp.get_state_dict(self.model, self.optimizer, options=FULL)
        return model, optimizer  # type: ignore[return-value]


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state; where a part of it is frozen, what trains alone: the recipe says where the rest comes from.

    A weight that has two names (T5's embedding) is there under its first.
    """
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if len(trained) < sum(1 for _ in module.parameters()):
        return {name: value for name, value in module.state_dict().items() if name in trained}
    seconds = {name for name, _ in module.named_parameters(remove_duplicate=False)} - trained
    return {name: value for name, value in module.state_dict().items() if name not in seconds}


def load_trained(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `trained_state` gave; a name too many or too few raises RuntimeError, as load_state_dict does."""
    trained = trained_state(module)
    frozen = {name: value for name, value in module.state_dict().items() if name not in trained}
    if unknown := frozen.keys() & state.keys():
        raise RuntimeError(f"{min(unknown)} does not train here, but did where the weights come from")
    module.load_state_dict({**frozen, **state})


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own numbers: step, best_step, best_value."""
    return json.loads((checkpoint / "trainer.json").read_text())


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """safetensors; a full disk is an OSError."""
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_objects(objects: dict[str, Any], file: Path) -> None:
    """torch.save; a full disk is an OSError (torch says no more than 'unexpected pos')."""
    try:
        torch.save(objects, file)
    except RuntimeError as error:
        free = shutil.disk_usage(file.parent).free
        raise OSError(f"{file.name} is not whole, with {free / 2**20:.1f} MiB free on its disk") from error


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
    load_trained(module, weights)
    return "ema" if averaged and has_average else "model"
