"""What others load: a pipeline folder for diffusers, with the averaged weights.

diffusers has no pipeline for a class-conditional UNet2DModel nor for a UNet3DConditionModel without text; there, and wherever
a pipeline lacks a part (a DiT without a VAE) or cannot drive the sampler (a DiT on a flow schedule), the folder holds the model
and its scheduler, which load by themselves. DiTPipeline takes 1000 for the null label: its guidance needs a model of 1000
classes, others run with guidance_scale=1.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from difftrain.adapters import lora_layers
from difftrain.denoisers import DiffusersDenoiser
from difftrain.lora.files import FILE, load_lora, save_kohya, save_lora
from difftrain.pipelines.text_to_image import TextToImageDenoiser, TextToImageModel
from difftrain.registry import InputError, Part
from difftrain.rng import Rng
from difftrain.sampling import DDIM, DDPM, SampleGenerator, diffusers_scheduler


def export_pipeline(denoiser: DiffusersDenoiser, generator: SampleGenerator, folder: Path) -> str:
    """Write the folder, whole or not at all; returns the class that loads it, or "" where its parts load one by one."""
    with written_whole(folder) as partial:
        return save_parts(denoiser, generator, partial)


def export_fine_tuned(
    model: TextToImageModel, denoiser: TextToImageDenoiser, folder: Path, about: Mapping[str, str],
    encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """The pretrained pipeline as a whole with what was trained in its place, in a folder that is written whole or not at all.

    about: goes into the headers of the weights' files. encoders: text encoders that changed without being the denoiser's.
    """
    own = dict(denoiser.text.encoders.items()) if denoiser.text is not None else {}
    trained = {model.family.denoiser_folder: denoiser.model, **own, **(encoders or {})}
    with written_whole(folder) as partial:
        model.pipeline.assembled(replaced=trained).save_pretrained(partial)
        for file in (file for name in trained for file in (partial / name).glob("*.safetensors")):
            add_metadata(file, about)


def add_metadata(file: Path, about: Mapping[str, str]) -> None:
    """Write facts into the header of a safetensors file; the tensors behind it are copied as they are."""
    beside = file.with_suffix(".partial")
    with file.open("rb") as old, beside.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **about}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
    os.replace(beside, file)


def export_lora(
    model: TextToImageModel | None, part: Part, denoiser: DiffusersDenoiser, generator: SampleGenerator, run: Path, about: dict[str, str]
) -> list[str]:
    """Write run/lora, which diffusers loads, and where other programs know the model run/kohya; returns what there is to tell.

    The file is loaded into a base that is read anew (part, or of a pipeline model), and its outputs are compared: RuntimeError where they
    differ.
    """
    with written_whole(run / "lora") as partial:
        save_lora(denoiser, partial, about)
    if model is None:
        difference = differs(denoiser, reloaded(part, run / "lora", denoiser), generator)
        return [same_outputs(run, "model that was read anew", difference)]
    difference = round_trip(model, cast(TextToImageDenoiser, denoiser), generator, run / "lora")
    told = [same_outputs(run, f"fresh {model.family.pipeline_class}", difference)]
    try:
        file = save_kohya(denoiser, run / "kohya" / f"{run.resolve().name}.safetensors", about)
    except InputError as error:
        return [*told, f"no kohya file: {error}"]
    return [*told, f"{file} has the names of kohya's scripts and ComfyUI"]


def same_outputs(run: Path, where: str, difference: float) -> str:
    shown = f"largest difference {difference:.1g} of the largest value" if difference else "difference 0"
    return f"{run / 'lora'} gives the same outputs in a {where} ({shown})"


def reloaded(part: Part, lora: Path, like: DiffusersDenoiser) -> DiffusersDenoiser:
    """The base model read anew, with the LoRA, where `like` is."""
    fresh = part.build()
    load_lora(fresh, lora)
    return fresh.to(next(like.parameters()).device).eval()


def round_trip(model: TextToImageModel, denoiser: TextToImageDenoiser, generator: SampleGenerator, lora: Path) -> float:
    """How much the denoiser (and its text encoders) in a fresh pipeline of diffusers with the LoRA differs from the trained one."""
    trained = {model.family.denoiser_folder: denoiser.model, **(dict(denoiser.text.encoders.items()) if denoiser.text is not None else {})}
    dtypes = {name: next(module.parameters()).dtype for name, module in trained.items()}
    pipeline = model.pipeline.assembled(only=tuple(trained), dtypes=dtypes)
    pipeline.load_lora_weights(lora, weight_name=FILE)
    device = next(denoiser.parameters()).device
    text = None
    if denoiser.text is not None:
        text = model.assembled_text({name: getattr(pipeline, name).to(device) for name in denoiser.text.encoders})
    fresh = TextToImageDenoiser(getattr(pipeline, model.family.denoiser_folder).to(device), model.family, text)
    return differs(denoiser, fresh.eval(), generator)


@torch.no_grad()
def differs(one: DiffusersDenoiser, other: DiffusersDenoiser, generator: SampleGenerator) -> float:
    """The largest difference of two denoisers' outputs at one noised input, relative to the output's largest value.

    What was trained is compared in the precision of the base, in which others load it. RuntimeError above 1e-5.
    """
    device, schedule = next(one.parameters()).device, generator.schedule
    labels = generator.conditioning.labels_of([0])
    cond = {name: value.to(device) for name, value in generator.conditioning(labels).items()}
    x = Rng(0, 0, [0]).normal(generator.shape, "round_trip").to(device)
    time = schedule.model_time(torch.tensor([schedule.num_timesteps // 2])).to(device)
    with in_base_precision(one), in_base_precision(other):
        ours, theirs = (denoiser(x, time, cond).double() for denoiser in (one, other))
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= 1e-5:
        raise RuntimeError(f"the LoRA that was written does not come back: in a model read anew outputs differ by {difference:.1e} of "
                           "their largest value. Do not use that file; the run's checkpoints hold the weights.")
    return difference


@contextlib.contextmanager
def in_base_precision(denoiser: nn.Module) -> Iterator[None]:
    """Within: LoRA weights are rounded to the precision of the layer that they are added to; they come back as they were."""
    own: list[tuple[nn.Parameter, torch.Tensor]] = []
    for layer in lora_layers(denoiser).values():
        precision = layer.get_base_layer().weight.dtype
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                own.append((parameter, parameter.data))
                parameter.data = parameter.data.to(precision)
    try:
        yield
    finally:
        for parameter, value in own:
            parameter.data = value


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Within: a folder beside `folder` to write to, which then takes its place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


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
