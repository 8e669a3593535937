"""Checkpoints: what is saved, where, and how the latest one is found.

A checkpoint is written beside its place and renamed when it is complete; a marker inside says so.
It holds all state that the rest of the run depends on and that cannot be computed: the weights,
their average, the optimizer, the regularizers' state, and the trainer's own few numbers.
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

from difftrain.core.errors import InputError
from difftrain.core.files import write_folder_beside
from difftrain.core.processes import on_main
from difftrain.training.ema import WeightAverage

MARKER = "complete"
MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
STATE_FILE = "state.pt"
TRAINER_FILE = "trainer.json"
FULL = dcp.StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)
MISFITS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    SafetensorError,
    EOFError,
    pickle.UnpicklingError,
)  # what loading raises for a damaged checkpoint, and for one of other parts


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint.

    Args:
        checkpoints: The folder of all checkpoints.
        step: Number of finished steps.
    """
    return checkpoints / f"step-{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def whole(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    marked = [marker.parent for marker in checkpoints.glob(f"step-*/{MARKER}")]
    found = [path for path in marked if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def latest(checkpoints: Path) -> Path | None:
    """Return the complete checkpoint of the largest step; None if there is none."""
    found = whole(checkpoints)
    return found[-1] if found else None


def write(checkpoints: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint that is complete or absent. The main process calls it.

    Args:
        checkpoints: The folder of all checkpoints.
        step: Number of finished steps.
        fill: Writes the content into an empty folder.

    Returns:
        The checkpoint's folder. An earlier one of this step is replaced.

    Raises:
        InputError: If the disk does not take it.
    """
    target = folder_of(checkpoints, step)
    try:
        with write_folder_beside(target) as partial:
            fill(partial)
            (partial / MARKER).write_text(f"{step}\n")
            if target.exists():
                remove(target)
    except OSError as error:
        intact = latest(checkpoints)
        left = "There is no earlier one" if intact is None else f"The latest whole one is {intact}"
        raise InputError(
            f"the checkpoint of step {step} could not be written to {target}: {error}. {left}. "
            "Make room (or point output: to another disk) and run the same command again."
        ) from error
    return target


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that half of one never looks complete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def rotate(checkpoints: Path, keep: int, protected: set[int]) -> None:
    """Remove old checkpoints, and incomplete ones that a killed run left.

    Args:
        checkpoints: The folder of all checkpoints.
        keep: Number of the newest checkpoints that stay.
        protected: Steps whose checkpoints stay too.
    """
    for path in whole(checkpoints)[:-keep]:
        if step_of(path) not in protected:
            remove(path)
    for path in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(path)


class Snapshot:
    """Saves and restores the state of a run's parts, sharded or not.

    Args:
        model: The network.
        optimizer: Its optimizer.
        average: The running average of its weights, if the run has one.
        others: Further parts by name, with `state_dict` and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        others: dict[str, Any],
    ):
        self.model = model
        self.optimizer = optimizer
        self.average = average
        self.others = others
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())

    def save(self, checkpoints: Path, step: int, state: dict[str, Any], recipe: str) -> None:
        """Write a checkpoint. Collective: it returns on every process once the checkpoint stands.

        Args:
            checkpoints: The folder of all checkpoints.
            step: Number of finished steps.
            state: The trainer's own numbers, as plain data.
            recipe: Text that the checkpoint keeps as its recipe.

        Raises:
            InputError: On every process, if the disk does not take it.
        """
        # Every process takes part in gathering what is sharded.
        model, optimizer = self._gathered()
        average = None
        if self.average is not None:
            average = {name: full(value) for name, value in self.average.state_dict().items()}
        objects = {"optimizer": optimizer}
        for name, other in self.others.items():
            objects[name] = other.state_dict()

        def fill(folder: Path) -> None:
            save_tensors(model, folder / MODEL_FILE)
            if average is not None:
                save_tensors(average, folder / AVERAGE_FILE)
            save_objects(objects, folder / STATE_FILE)
            (folder / TRAINER_FILE).write_text(json.dumps({"step": step, **state}))
            (folder / "recipe.yaml").write_text(recipe)

        on_main(lambda: write(checkpoints, step, fill))

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore every part from a checkpoint.

        Args:
            checkpoint: The checkpoint's folder.

        Returns:
            The trainer's own numbers.

        Raises:
            InputError: If the checkpoint is damaged, or if it is one of other parts.
        """
        try:
            return self._load(checkpoint)
        except MISFITS as error:
            reason = " ".join(str(error).split()).rstrip(".")[:500]
            if isinstance(error, KeyError):
                reason = f"it lacks {error}"
            raise InputError(
                f"{checkpoint} cannot be resumed: {reason}. Use the recipe (without one: the same "
                "parts) that it was trained with, start in a new folder (--fresh), or remove the "
                "checkpoint to go on from the one before."
            ) from error

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        # The network and its optimizer
        model = load_file(checkpoint / MODEL_FILE)
        saved = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        if self.sharded:
            dcp.set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=model,
                optim_state_dict=saved["optimizer"],
                options=FULL,
            )
        else:
            load_trained(self.model, model)
            self.optimizer.load_state_dict(saved["optimizer"])
        # The average, and the other parts
        if self.average is not None:
            like = self.average.state_dict()
            average = load_file(checkpoint / AVERAGE_FILE)
            shards = {name: as_sharded(value, like[name]) for name, value in average.items()}
            self.average.load_state_dict(shards)
        for name, other in self.others.items():
            other.load_state_dict(saved[name])
        return trainer_state(checkpoint)

    def _gathered(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trained weights and the optimizer's state, unsharded. Collective."""
        if self.sharded:
            model, optimizer = dcp.get_state_dict(self.model, self.optimizer, options=FULL)
            return model, optimizer  # type: ignore[return-value]
        trained = trained_state(self.model)
        weights = {name: value.detach().cpu() for name, value in trained.items()}
        return weights, self.optimizer.state_dict()


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state, and of a partly frozen module only the parameters that train.

    The recipe says where frozen weights come from. A parameter with two names, as T5's embedding
    has them, is listed under the first one.
    """
    state = module.state_dict()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if len(trained) < sum(1 for _ in module.parameters()):
        return {name: value for name, value in state.items() if name in trained}
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)} - trained
    return {name: value for name, value in state.items() if name not in aliases}


def load_trained(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the state that `trained_state` returned.

    Args:
        module: The module.
        state: Its state.

    Raises:
        RuntimeError: If a name is missing or too many, as `load_state_dict` raises it.
    """
    trained = trained_state(module)
    frozen = {name: value for name, value in module.state_dict().items() if name not in trained}
    unknown = frozen.keys() & state.keys()
    if unknown:
        raise RuntimeError(
            f"{min(unknown)} is frozen here, but was trained in the run of these weights"
        )
    module.load_state_dict({**frozen, **state})


def load_weights(module: nn.Module, checkpoint: Path, averaged: bool) -> str:
    """Load a checkpoint's weights.

    Args:
        module: The network.
        checkpoint: The checkpoint's folder.
        averaged: Whether to take the averaged weights, if the checkpoint has them.

    Returns:
        Which weights were loaded: "ema" or "model".
    """
    weights = load_file(checkpoint / MODEL_FILE)
    kind = final_weights(checkpoint) if averaged else "model"
    if kind == "ema":
        weights |= load_file(checkpoint / AVERAGE_FILE)
    load_trained(module, weights)
    return kind


def final_weights(checkpoint: Path) -> str:
    """Return which weights a run ends with: "ema" where the checkpoint has them, else "model"."""
    return "ema" if (checkpoint / AVERAGE_FILE).exists() else "model"


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's own numbers from a checkpoint: step, best_step, best_value ..."""
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_FILE).read_text())
    return state


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors.

    Args:
        tensors: Tensors by name.
        file: The file.

    Raises:
        OSError: If the disk is full.
    """
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_objects(objects: dict[str, Any], file: Path) -> None:
    """Write state dicts with torch.save.

    Args:
        objects: State dicts by name.
        file: The file.

    Raises:
        OSError: If the disk is full, of which torch says no more than "unexpected pos".
    """
    try:
        torch.save(objects, file)
    except RuntimeError as error:
        free = shutil.disk_usage(file.parent).free / 2**20
        raise OSError(f"{file.name} is not whole, with {free:.1f} MiB free on its disk") from error


def full(value: Tensor) -> Tensor:
    """Return a tensor, sharded or not, as one tensor on the CPU. Collective."""
    whole_value = value.full_tensor() if isinstance(value, DTensor) else value
    return whole_value.detach().cpu()


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor over processes in the way in which another one is sharded.

    Args:
        value: The whole tensor.
        like: The tensor whose layout is taken.
    """
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
