"""What others load: a pipeline folder for diffusers, with the averaged weights.

diffusers has no pipeline for a class-conditional UNet2DModel nor for a UNet3DConditionModel without text; there, and wherever
a pipeline lacks a part (a DiT without a VAE) or cannot drive the sampler (a DiT on a flow schedule), the folder holds the model
and its scheduler, which load by themselves. DiTPipeline takes 1000 for the null label: its guidance needs a model of 1000
classes, others run with guidance_scale=1.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from difftrain.denoisers import DiffusersDenoiser
from difftrain.sampling import DDIM, DDPM, SampleGenerator, diffusers_scheduler


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

    model, encoder, name = denoiser.model, generator.encoder, pipeline_of(denoiser, generator)
    if encoder is not None:
        encoder.vae.register_to_config(scaling_factor=encoder.scale)  # a scale of the recipe's own goes along
    if name == "DDPMPipeline":
        DDPMPipeline(model, scheduler_for(name, generator)).save_pretrained(folder)
    elif name == "DiTPipeline" and encoder is not None:
        DiTPipeline(model, encoder.vae, scheduler_for(name, generator)).save_pretrained(folder)
    else:
        denoiser.save_model(folder / ("transformer" if type(model).__name__ == "DiTTransformer2DModel" else "unet"))
        generator.scheduler.save_pretrained(folder / "scheduler")
        if encoder is not None:
            encoder.vae.save_pretrained(folder / "vae")
    return name


def pipeline_of(denoiser: DiffusersDenoiser, generator: SampleGenerator) -> str:
    """The diffusers pipeline that can make this run's images, or "" where there is none."""
    kind, encoder = type(denoiser.model).__name__, generator.encoder
    if kind == "UNet2DModel" and not generator.conditioning.conditions and encoder is None:
        return "DDPMPipeline"
    if kind == "DiTTransformer2DModel" and encoder is not None and encoder.shift == 0 and generator.schedule.kind == "diffusion":
        return "DiTPipeline"
    return ""


def scheduler_for(pipeline: str, generator: SampleGenerator) -> Any:
    """The run's scheduler, or where the pipeline's own loop cannot drive it one with the same noise levels that it can.

    Neither pipeline scales the first noise, as Euler needs. DDPMPipeline passes a generator to every step, which UniPC does not
    take, and hands it all channels, of which with a learned variance DDPM alone knows the second half; DiTPipeline cuts them off.
    """
    sampler, learned = generator.sampling.sampler, generator.variance.output_channels == 2
    keeps_variance = learned and pipeline == "DDPMPipeline"
    if keeps_variance:
        sampler = DDPM(spacing=sampler.spacing)
    elif sampler.class_name == "EulerDiscreteScheduler" or (pipeline == "DDPMPipeline" and sampler.class_name == "UniPCMultistepScheduler"):
        sampler = DDIM(spacing=sampler.spacing)
    return diffusers_scheduler(sampler, generator.schedule, generator.parameterization, generator.encoder is None, keeps_variance)
