"""Folds a LoRA into its base model, for programs without LoRA."""

from collections.abc import Sequence
from pathlib import Path

import torch

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.launch import join_processes
from difftrain.models.lora.files import merge
from difftrain.run.export import PIPELINE_FOLDER, export_pipeline
from difftrain.run.sampling import Asked
from difftrain.run.trained import TrainedRun

logger = wing_logger(__name__)


def merge_run(
    run: str,
    out: str,
    overrides: Sequence[str] = (),
    asked: Asked | None = None,
    step: int | None = None,
    averaged: bool = True,
) -> None:
    """Write a run's model with LoRAs folded into its weights.

    Args:
        run: The run folder.
        out: A new folder for the pipeline.
        overrides: Changes of the run's recipe.
        asked: The scale of the run's own LoRA, and further LoRAs.
        step: Step of the checkpoint; None for that of the final weights.
        averaged: Whether averaged weights are wanted, if there are any.

    Raises:
        InputError: If there is no LoRA, or if the folder is not empty.
    """
    asked, folder = asked or Asked(), Path(out).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {out}: the folder is not empty. Write the path of a new folder.")
    join_processes()
    trained = TrainedRun(run, overrides)
    model = trained.model
    asked.check(model)
    if not model.makes_lora and not asked.loras:
        raise InputError(
            f"{run}: the run did not train a LoRA, and no --lora is given; its result is in "
            f"{Path(run) / PIPELINE_FOLDER} already."
        )
    chosen = trained.chosen_step(step)
    denoiser, weights = trained.denoiser(chosen, averaged, torch.device("cpu"))
    encoders = asked.apply(denoiser, model)
    merge(denoiser, encoders)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_pipeline(model, denoiser, chosen, folder, encoders)
    logger.info(f"step {chosen} ({weights} weights) with LoRAs folded in: {folder}")
