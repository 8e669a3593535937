"""What others load: a pipeline folder for diffusers, with the averaged weights.

diffusers has no pipeline for a class-conditional UNet2DModel; there, and wherever a pipeline lacks a part (a DiT without a
VAE), the folder holds the model and its scheduler, which load by themselves.
"""

import os
import shutil
from pathlib import Path

from difftrain.denoisers import DiffusersDenoiser
from difftrain.sampling import SampleGenerator


def export_pipeline(denoiser: DiffusersDenoiser, generator: SampleGenerator, folder: Path) -> str:
    """Write the folder, whole or not at all; returns the class that loads it, or "" where its parts load one by one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    name = save_parts(denoiser, generator, partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return name


def save_parts(denoiser: DiffusersDenoiser, generator: SampleGenerator, folder: Path) -> str:
    from diffusers import DDPMPipeline, DiTPipeline

    model, scheduler, kind = denoiser.model, generator.scheduler, type(denoiser.model).__name__
    if kind == "UNet2DModel" and not generator.conditioning.conditions and generator.encoder is None:
        DDPMPipeline(model, scheduler).save_pretrained(folder)
        return "DDPMPipeline"
    if kind == "DiTTransformer2DModel" and generator.encoder is not None:
        DiTPipeline(model, generator.encoder.vae, scheduler).save_pretrained(folder)
        return "DiTPipeline"
    denoiser.save_model(folder / ("transformer" if kind == "DiTTransformer2DModel" else "unet"))
    scheduler.save_pretrained(folder / "scheduler")
    if generator.encoder is not None:
        generator.encoder.vae.save_pretrained(folder / "vae")
    return ""
