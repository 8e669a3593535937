"""Builds what diagnoses a run: the network, with held-out and training data."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import write_json
from difftrain.core.launch import join_processes
from difftrain.core.processes import is_main
from difftrain.core.registry import Part, dump
from difftrain.data.items import DATASETS, Images, MapDataset, load_images
from difftrain.data.unreadable import TRAINING, ReadErrors
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic, Subject
from difftrain.recipe.schema import EvaluationSettings
from difftrain.recipe.yaml_text import read_yaml
from difftrain.report import write_report
from difftrain.run.data import of_model
from difftrain.run.lora_scale import check_lora_scale, set_lora_scale
from difftrain.run.model import ModelPlan
from difftrain.run.trained import TrainedRun

FILE = "diagnostics.json"
LEFT_OUT = "left_out"  # key of the file: why a diagnostic has no result, by its name
QUICK = {"num": 256, "num_timesteps": 20}  # of the held-out gap after the final scores
logger = wing_logger(__name__)


class HeldOut(NamedTuple):
    """Data that a run has not been trained on.

    Attributes:
        key: What messages call it.
        block: Its block.
    """

    key: str
    block: Part


def subject_of(
    model: ModelPlan,
    denoiser: nn.Module | None,
    step: int,
    weights: str,
    held_out: HeldOut,
    limit: int,
    device: torch.device,
    errors: ReadErrors,
    training: MapDataset | None,
    lora_scale: float | None = None,
) -> Subject:
    """Return what diagnostics look at. Collective.

    Args:
        model: The run's model.
        denoiser: Its network; None where it comes later.
        step: Step of the weights.
        weights: Which weights these are, "ema" or "model".
        held_out: The held-out data.
        limit: The most items of either set, evenly spread.
        device: Where the network is.
        errors: What becomes of items that cannot be read.
        training: The training data; None where it is not looked at, or not there.
        lora_scale: Scale of the run's LoRA; None: as it was trained.
    """
    data = of_model(held_out.block.build(), model, held_out.key)
    described: dict[str, Any] = {
        "step": step,
        "weights": weights,
        "held_out": held_out.block.dump(),
        "parameterization": model.parameterization,
    }
    if model.captions is not None:
        described["captions"] = model.captions.described()
    if model.makes_lora:
        described["lora_scale"] = 1.0 if lora_scale is None else lora_scale
    return Subject(
        denoiser or nn.Identity(),
        model.schedule,
        model.parameterization,
        model.variance,
        model.conditioning,
        model.shape,
        clean(model, errors.part(data, held_out.key, limit), device),
        None if training is None else clean(model, errors.part(training, TRAINING, limit), device),
        model.encoder,
        clips=model.generator.clips,
        guidance=model.generator.sampling.guidance,
        block_size=model.generator.sampling.block_size,
        device=device,
        described=described,
    )


def clean(model: ModelPlan, data: MapDataset, device: torch.device) -> Clean:
    """Return the clean samples of a data set."""
    if data.items_are == "tensors":
        items = [data[i] for i in range(len(data))]
        labels = [item.label for item in items]
        known = None if None in labels else torch.tensor(labels)
        values = torch.stack([item.values for item in items])
        return Clean.of_tensors(values, known, device)
    assert model.transform is not None
    images = conditioned(load_images(data, model.transform), model)
    return Clean.of_images(images, model.encoder, device)


def conditioned(images: Images, model: ModelPlan) -> Images:
    """Replace labels by what the network is conditioned on: prompts by their numbers.

    Captions are shown as in training.

    Raises:
        InputError: If the network takes prompts and the images have no captions.
    """
    if not model.model.takes_prompts:
        return images
    if images.captions is None:
        raise InputError(
            "the model takes prompts, but the images to look at have no captions. Write data with "
            "captions (captions: sidecar, caption_column: ...)."
        )
    assert model.captions is not None
    prompts = [model.captions.in_samples(caption) for caption in images.captions]
    return dataclasses.replace(images, labels=model.conditioning.ids_of(prompts))


def held_out_gap(
    model: ModelPlan,
    denoiser: nn.Module,
    step: int,
    weights: str,
    folder: Path,
    device: torch.device,
    held_out: Part,
    training: MapDataset,
    errors: ReadErrors,
) -> None:
    """Measure the denoising loss on held-out against training images, on a few hundred of each.

    The result goes into diagnostics.json. Collective.
    """
    part = DIAGNOSTICS.parse({"type": "denoising_error", **QUICK}, "diagnostics")
    limit, data = QUICK["num"], HeldOut("evaluation.reference", held_out)
    subject = subject_of(model, denoiser, step, weights, data, limit, device, errors, training)
    result = finite(part.build()(subject))
    if is_main():
        write_json(folder / FILE, {part.name: result})


def held_out_data(settings: EvaluationSettings | None, data: str | None) -> HeldOut:
    """Return the block of data that the run has not been trained on.

    Args:
        settings: The recipe's evaluation block, whose reference it is if no other data is given.
        data: A folder, or a data block as YAML.

    Raises:
        InputError: If there is neither.
    """
    if data is not None:
        is_block = data.lstrip().startswith("{")
        block = read_yaml(data, "--data") if is_block else {"type": "image_folder", "path": data}
        return HeldOut("--data", DATASETS.parse(block, "--data"))
    if settings is None:
        raise InputError(
            "the recipe has no evaluation: block, whose reference would be the held-out images. "
            "Give them with --data: a folder, or a block such as '{type: digits, part: held_out}'."
        )
    return HeldOut("evaluation.reference", settings.reference)


def read_results(file: Path) -> dict[str, Any]:
    """Read what earlier diagnoses wrote; empty where there is no file.

    Raises:
        InputError: If the file cannot be read. It is not changed.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(
            f"{file} is not JSON ({error}). Move or delete it, and run the command again."
        ) from error
    return dict(found)


def finite(value: Any) -> Any:
    """Return plain data for JSON, in which a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return dump(value)


def diagnose_run(
    run: str,
    which: Sequence[str] = (),
    overrides: Sequence[str] = (),
    step: int | None = None,
    averaged: bool = True,
    data: str | None = None,
    lora_scale: float | None = None,
) -> None:
    """Run diagnostics on all processes and add their results to RUN/diagnostics.json.

    Args:
        run: The run folder.
        which: Names with commas between them, or blocks such as '{type: smoothness, num: 500}';
            empty runs all that can be measured, and says why others cannot.
        overrides: Changes of the run's recipe.
        step: Step of the checkpoint; None for that of the final weights.
        averaged: Whether averaged weights are wanted, if there are any.
        data: A folder or a data block of held-out images; None takes the evaluation's reference.
        lora_scale: Scale of the run's LoRA; None leaves it as it was trained.

    Raises:
        InputError: If a diagnostic cannot be computed.
    """
    device = join_processes()
    blocks = ["data", "loader", *(["evaluation"] if data is None else [])]
    trained = TrainedRun(run, overrides, blocks)
    check_lora_scale(lora_scale, trained.model)
    parts = parsed(which or list(DIAGNOSTICS.constructors))
    diagnostics = [part.build() for part in parts]
    file = trained.folder / FILE
    read_results(file)
    chosen = trained.chosen_step(step)
    # What the diagnostics look at
    settings = None
    if data is None and trained.recipe.evaluation is not None:
        settings = trained.recipe.evaluation.build()
    held_out = held_out_data(settings, data)
    limit = max(diagnostic.num for diagnostic in diagnostics)
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    set_lora_scale(denoiser, lora_scale)
    training = training_table(trained)
    subject = subject_of(
        trained.model,
        denoiser,
        chosen,
        weights,
        held_out,
        limit,
        device,
        trained.errors(),
        training,
        lora_scale,
    )
    # Those that nobody asked for by name may be impossible.
    left_out = {} if which else impossible(parts, diagnostics, subject)
    for part, diagnostic in zip(parts, diagnostics, strict=True):
        if part.name in left_out:
            logger.info(f"{part.name} is left out: {left_out[part.name]}")
            continue
        try:
            diagnostic.check(subject)
        except InputError as error:
            raise InputError(f"diagnostic {part.name}: {error}") from error
    # Each result is kept before the next one is computed.
    num = len(diagnostics) - len(left_out)
    logger.info(f"{num} diagnostics of step {chosen} ({weights} weights)")
    for part, diagnostic in zip(parts, diagnostics, strict=True):
        if part.name in left_out:
            continue
        result = finite(diagnostic(subject))
        logger.info(f"{part.name}: {shown(result)}")
        if is_main():
            write_json(file, with_result(read_results(file), part.name, result))
    if is_main() and not which:
        found = {name: result for name, result in read_results(file).items() if name != LEFT_OUT}
        write_json(file, {**found, LEFT_OUT: left_out} if left_out else found)
    logger.info(f"written to {file}")
    if is_main():
        write_report(trained.folder)


def with_result(results: dict[str, Any], name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Add a result, which is then no longer left out.

    Args:
        results: The content of the file.
        name: Name of the diagnostic.
        result: What it has measured.
    """
    found = {**results, name: result}
    left_out = {key: why for key, why in found.pop(LEFT_OUT, {}).items() if key != name}
    return {**found, LEFT_OUT: left_out} if left_out else found


def impossible(
    parts: Sequence[Part], diagnostics: Sequence[Diagnostic], subject: Subject
) -> dict[str, str]:
    """Return which diagnostics cannot be measured, and why.

    Raises:
        InputError: If none of them can.
    """
    found = {}
    for part, diagnostic in zip(parts, diagnostics, strict=True):
        try:
            diagnostic.check(subject)
        except InputError as error:
            found[part.name] = str(error)
    if len(found) == len(parts):
        reasons = " ".join(f"{name}: {reason}" for name, reason in found.items())
        raise InputError(f"none of the diagnostics can be measured. {reasons}")
    return found


def training_table(trained: TrainedRun) -> MapDataset | None:
    """Return a run's training data; None for a stream, or if it cannot be opened."""
    try:
        data = trained.recipe.data.build()
    except InputError as error:
        logger.info(f"the training data cannot be opened, so nothing is compared with it: {error}")
        return None
    return data if isinstance(data, MapDataset) else None


def parsed(which: Sequence[str]) -> list[Part]:
    """Return the parts that --which names.

    Raises:
        InputError: If a part is not known, has wrong arguments, or is named twice.
    """
    blocks: list[str] = []
    for text in which:
        if "{" in text:
            blocks.append(text)
        else:
            blocks += text.split(",")
    parts = [DIAGNOSTICS.parse(read_yaml(block, "--which"), "--which") for block in blocks]
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"--which: {twice[0]} is named twice, but there is one result of each. Name it once."
        )
    return parts


def shown(result: dict[str, Any]) -> str:
    """Return the main numbers of a result in one line."""
    found = []
    for key in ("value", "floor", "standard_error", "mean_rejected", "psnr"):
        if isinstance(result.get(key), float):
            name = "" if key == "value" else f"{key.replace('_', ' ')} "
            found.append(f"{name}{result[key]:.4g}")
    return ", ".join(found) or "not finite"
