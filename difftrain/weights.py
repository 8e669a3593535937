"""A trained run opened again: its plan, and its network with the weights that were chosen."""

from pathlib import Path

import torch

from difftrain import checkpoint
from difftrain.denoisers import DiffusersDenoiser
from difftrain.plan import Plan
from difftrain.recipe import load
from difftrain.registry import InputError


class TrainedRun:
    """RUN's recipe as a plan. overrides: of its recipe, such as sampling.guidance=2."""

    def __init__(self, folder: str | Path, overrides: list[str] | None = None):
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise InputError(f"{str(folder)!r} is not the folder of a run: it holds no recipe.yaml. Write the output: of a trained recipe.")
        self.plan = Plan(load(self.folder / "recipe.yaml", overrides or []), trains=False)

    def chosen_step(self, step: int | None) -> int:
        """The step asked for, else that of the final weights: the best by the in-loop evaluation, else the latest."""
        checkpoints = self.folder / "checkpoints"
        steps = [checkpoint.step_of(path) for path in checkpoint.whole(checkpoints)]
        if not steps:
            raise InputError(f"{self.folder} holds no whole checkpoint yet. Train it first: difftrain train {self.folder / 'recipe.yaml'}.")
        if step is not None and step not in steps:
            raise InputError(f"--step {step}: {self.folder} holds the checkpoints of the steps {', '.join(map(str, steps))}.")
        best = checkpoint.trainer_state(checkpoint.folder_of(checkpoints, steps[-1]))["best_step"]
        return step if step is not None else best or steps[-1]

    def denoiser(self, step: int, averaged: bool, device: torch.device) -> tuple[DiffusersDenoiser, str]:
        """The network in eval mode, and which of its weights these are ("ema" or "model")."""
        denoiser = self.plan.denoiser()
        source = checkpoint.folder_of(self.folder / "checkpoints", step)
        try:
            weights = checkpoint.load_weights(denoiser, source, averaged)
        except RuntimeError as error:  # torch names every tensor that does not fit; its first line says which model
            raise InputError(f"the weights in {source} do not fit the model of the recipe: {str(error).splitlines()[0]} "
                             "Leave model: out of the overrides.") from error
        self.plan.preparation.to(device)
        return denoiser.to(device).eval(), weights
