"""Exports a run: a diffusers pipeline, or a LoRA that is checked in a freshly loaded base."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain import __version__
from difftrain.core.errors import InputError
from difftrain.core.files import write_folder_beside
from difftrain.core.rng import Rng
from difftrain.generation.generator import SampleGenerator
from difftrain.generation.samplers import DDIM, DDPM, SETS_STRIDE, FlowEuler, Spacing
from difftrain.models.adapters import lora_layers
from difftrain.models.lora.files import save_kohya, save_lora
from difftrain.models.model import DenoiserNetwork, ExportParts
from difftrain.run.model import ModelPlan

PIPELINE_FOLDER = "pipeline"
LORA_FOLDER = "lora"
LARGEST_DIFFERENCE = 1e-5  # of the outputs of a LoRA that was written and read again, relative


def export(model: ModelPlan, denoiser: DenoiserNetwork, step: int, folder: Path) -> list[str]:
    """Write what other programs load into a run folder.

    Args:
        model: The run's model.
        denoiser: The network with its final weights.
        step: Their step.
        folder: The run folder.

    Returns:
        Messages about what was written.

    Raises:
        RuntimeError: If a LoRA does not give the same outputs after it was written and read again.
    """
    if model.makes_lora:
        return export_lora(model, denoiser, step, folder)
    target = folder / PIPELINE_FOLDER
    export_pipeline(model, denoiser, step, target)
    messages = [f"{target}: the model, as other programs load it"]
    config = target / "scheduler" / "scheduler_config.json"
    if config.is_file():
        messages += other_steps(json.loads(config.read_text()), model.generator.sampler.steps)
    return messages


def other_steps(config: Mapping[str, Any], steps: int) -> list[str]:
    """Say where diffusers draws other samples from an exported pipeline than the run does.

    Args:
        config: The scheduler's config.
        steps: The run's number of steps.
    """
    import diffusers

    name = config["_class_name"]
    if name not in SETS_STRIDE:
        return []
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    total = scheduler.config.num_train_timesteps
    timesteps = [int(t) for t in scheduler.timesteps]
    if all(t - following == total // steps for t, following in pairwise(timesteps)):
        return []
    return [
        f"diffusers' {name} steps by {total // steps} timesteps at {steps} steps, whatever the "
        "next one of its list is: a pipeline that is called with these steps draws other samples "
        f"than difftrain. Call it with steps that divide {total}, and timestep_spacing: trailing."
    ]


def export_pipeline(
    model: ModelPlan,
    denoiser: DenoiserNetwork,
    step: int,
    folder: Path,
    encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write the model's pipeline folder, whole or not at all.

    Args:
        model: The run's model.
        denoiser: The network with its final weights.
        step: Their step.
        folder: The folder to write.
        encoders: Frozen text encoders, by folder, whose weights a LoRA has changed; None for none.
    """
    generator = model.generator
    parts = ExportParts(
        encoder=model.encoder,
        schedule=model.schedule,
        conditions=model.conditioning.conditions,
        scheduler=lambda pipeline: scheduler_for(pipeline, generator),
        about=about(model, step),
        recipe=model.recipe.to_yaml(),
    )
    with write_folder_beside(folder) as partial:
        model.model.save(denoiser, partial, parts, encoders)


def about(model: ModelPlan, step: int) -> dict[str, str]:
    """Return facts for the headers of the weights' files."""
    recipe = model.recipe
    batch_size = training_value(recipe.training, "batch_size")
    known = {
        "base_model": model.model.path,
        "license": recipe.license,
        "step": str(step),
        "images": str(step * batch_size),
        "recipe": recipe.to_yaml(),
        "software": f"difftrain {__version__}",
    }
    return {key: value for key, value in known.items() if value}


def training_value(block: Any, key: str) -> Any:
    """Return a value of the training block, also where the block was not checked."""
    return block[key] if isinstance(block, dict) else block.arguments[key]


def scheduler_for(pipeline: str, generator: SampleGenerator) -> Any:
    """Return the scheduler that a pipeline's own loop can drive, with the run's noise levels.

    DDPMPipeline and DiTPipeline do not scale the first noise, which Euler's method needs.
    DDPMPipeline passes a generator to every step, which UniPC does not take. With a learned
    variance it also passes on the channels of the variance, which DDPM alone reads; DiTPipeline
    removes them. A scheduler that is not a class of diffusers is replaced by DDIM, on a flow
    schedule by Euler's method, because other programs do not have it.

    Args:
        pipeline: The pipeline's class name; "" where the parts are loaded one by one.
        generator: The run's generator.
    """
    sampler, scheduler = generator.sampler, generator.scheduler
    if not type(scheduler).__module__.startswith("diffusers."):
        sampler = FlowEuler() if generator.schedule.kind == "flow" else DDIM()
    elif not pipeline:
        return scheduler
    has_variance = generator.variance.output_channels == 2
    keeps_variance = has_variance and pipeline == "DDPMPipeline"
    spacing: Spacing = getattr(sampler, "spacing", "trailing")
    name = sampler.class_name
    is_undriven = name == "EulerDiscreteScheduler"
    if pipeline == "DDPMPipeline" and name == "UniPCMultistepScheduler":
        is_undriven = True
    if keeps_variance:
        sampler = DDPM(spacing=spacing)
    elif is_undriven:
        sampler = DDIM(spacing=spacing)
    return sampler.build(
        generator.schedule, generator.parameterization, generator.clips, keeps_variance
    )


# LoRA


def export_lora(model: ModelPlan, denoiser: DenoiserNetwork, step: int, folder: Path) -> list[str]:
    """Write lora/ and, for models that take prompts, kohya/; then check the LoRA file.

    The file is loaded into a freshly loaded base, and outputs are compared.

    Returns:
        Messages about what was written.

    Raises:
        RuntimeError: If the outputs differ.
    """
    facts = about(model, step)
    lora = folder / LORA_FOLDER
    with write_folder_beside(lora) as partial:
        save_lora(denoiser, partial, facts)
    fresh = model.model.with_lora(denoiser, lora)
    difference = largest_difference(denoiser, fresh, model.generator)
    shown = "difference 0"
    if difference:
        shown = f"largest difference {difference:.1g} of the largest value"
    messages = [f"{lora} gives the same outputs in a {model.model.loaded_by} ({shown})"]
    if model.model.takes_prompts:
        messages.append(export_kohya(denoiser, folder, facts))
    return messages


def export_kohya(denoiser: DenoiserNetwork, folder: Path, facts: Mapping[str, str]) -> str:
    """Write the LoRA under the names of kohya's scripts, and return a message about it."""
    file = folder / "kohya" / f"{folder.resolve().name}.safetensors"
    try:
        save_kohya(denoiser, file, facts)
    except InputError as error:
        return f"no kohya file: {error}"
    return f"{file} has the names of kohya's scripts and ComfyUI"


@torch.no_grad()
def largest_difference(
    one: DenoiserNetwork, other: DenoiserNetwork, generator: SampleGenerator
) -> float:
    """Return the largest difference of two networks' outputs, relative to the largest value.

    What was trained is compared in the precision of the base, in which others load it.

    Raises:
        RuntimeError: If they differ by more than `LARGEST_DIFFERENCE`.
    """
    device, schedule = one.device, generator.schedule
    labels = generator.conditioning.labels_of([0])
    cond = {name: value.to(device) for name, value in generator.conditioning(labels).items()}
    x = Rng(0, 0, [0]).normal(generator.shape, "round_trip").to(device)
    time = schedule.model_time(torch.tensor([schedule.num_timesteps // 2])).to(device)
    with in_base_precision(one), in_base_precision(other):
        ours, theirs = one(x, time, cond).double(), other(x, time, cond).double()
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            "the LoRA file does not reproduce the trained network: in a freshly loaded model, "
            f"outputs differ by {difference:.1e} of their largest value. Do not use that file; the "
            "run's checkpoints hold the weights."
        )
    return difference


@contextlib.contextmanager
def in_base_precision(denoiser: nn.Module) -> Iterator[None]:
    """Round LoRA weights, within the context, to the precision of the layer they change."""
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
