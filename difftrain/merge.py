"""A LoRA folded into its model: `difftrain merge RUN --out DIR` writes what a full fine-tune would have left, for programs without LoRA."""

from collections.abc import Sequence
from pathlib import Path

import torch

from difftrain.entry import DONE, join_processes, say
from difftrain.export import export_fine_tuned, export_pipeline
from difftrain.lora.files import merge
from difftrain.pipelines.text_to_image import TextToImageDenoiser
from difftrain.registry import InputError
from difftrain.results import about
from difftrain.sample import Asked
from difftrain.weights import TrainedRun


def merge_run(
    run: str, out: str, overrides: Sequence[str] = (), asked: Asked | None = None, step: int | None = None, averaged: bool = True
) -> int:
    """Write the run's model with its LoRA, and others that are asked for, folded into its weights: a pipeline that needs no LoRA."""
    asked, folder = asked or Asked(), Path(out).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {out}: the folder is not empty. Write a new one.")
    join_processes()
    trained = TrainedRun(run, list(overrides))
    plan = trained.plan
    asked.check(plan)
    if not (plan.adapter and plan.adapter.makes_lora) and not asked.loras:
        raise InputError(f"{run}: the run did not train a LoRA, and no --lora is given; its result is in {Path(run) / 'pipeline'} already.")
    chosen = trained.chosen_step(step)
    denoiser, weights = trained.denoiser(chosen, averaged, torch.device("cpu"))
    encoders = asked.apply(denoiser, plan)
    merge(denoiser, encoders)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(denoiser, TextToImageDenoiser) and plan.pipeline is not None:
        export_fine_tuned(plan.pipeline, denoiser, folder, about(plan, chosen), encoders)
    else:
        export_pipeline(denoiser, plan.generator, folder)
    say(f"step {chosen} ({weights} weights) with its LoRA folded in: {folder}")
    return DONE
