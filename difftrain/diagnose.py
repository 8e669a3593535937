"""Diagnostics of a trained run: `difftrain diagnose RUN --which denoising_error,...`, or `accelerate launch -m difftrain.diagnose ...`.

Results go to RUN/diagnostics.json by name. Images to look at are those of the recipe's evaluation reference, which the run has not seen.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain.data.items import Images, ImageStream, load_images
from difftrain.diagnostics import cumulative, denoising, exposure, inversion, prediction, smoothness  # noqa: F401  # they register
from difftrain.diagnostics.subject import Clean, Subject
from difftrain.distributed import is_main
from difftrain.entry import DONE, guarded, join_processes, leave, say
from difftrain.plan import Plan
from difftrain.recipe import read_yaml
from difftrain.registry import DATASETS, DIAGNOSTICS, InputError, Part, dump
from difftrain.runlog import write_atomically
from difftrain.weights import TrainedRun

FILE = "diagnostics.json"
QUICK = {"num": 256, "num_timesteps": 20}  # of the held-out gap that every run measures at its end


def diagnose(
    run: str, which: Sequence[str] = (), overrides: Sequence[str] = (), step: int | None = None, averaged: bool = True,
    data: str | None = None,
) -> int:
    """Run diagnostics on all processes and add them to RUN/diagnostics.json, in the place of earlier ones of their names.

    which: names, with commas between them, or blocks such as '{type: smoothness, num: 500}'; none: all. data: a data block or a folder of
    held-out images, by default the recipe's evaluation reference.
    """
    device = join_processes()
    trained = TrainedRun(run, list(overrides))
    parts = parsed(which or list(DIAGNOSTICS.constructors))
    diagnostics = [part.build() for part in parts]
    file = trained.folder / FILE
    read_results(file)
    chosen = trained.chosen_step(step)
    held_out = held_out_data(trained.plan, data)
    limit = max(diagnostic.num for diagnostic in diagnostics)
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    subject = subject_of(trained.plan, denoiser, chosen, weights, held_out, limit, device)
    for part, diagnostic in zip(parts, diagnostics, strict=True):
        try:
            diagnostic.check(subject)
        except InputError as error:
            raise InputError(f"diagnostic {part.name}: {error}") from error
    say(f"{len(diagnostics)} diagnostics of step {chosen} ({weights} weights)")
    for part, diagnostic in zip(parts, diagnostics, strict=True):
        result = finite(diagnostic(subject))
        say(f"{part.name}: {shown(result)}")
        if is_main():  # after each, so that what is done is kept
            write_atomically(file, json.dumps({**read_results(file), part.name: result}, indent=1) + "\n")
    say(f"written to {file}")
    return DONE


def parsed(which: Sequence[str]) -> list[Part]:
    """The parts that are named, each once."""
    blocks = [block for text in which for block in ([text] if "{" in text else text.split(","))]
    parts = [DIAGNOSTICS.parse(read_yaml(block, "--which"), "--which") for block in blocks]
    names = [part.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--which: {twice[0]} is named twice, but there is one result of each. Name it once.")
    return parts


def subject_of(
    plan: Plan, denoiser: nn.Module | None, step: int, weights: str, held_out: Part, limit: int, device: torch.device,
    with_training: bool = True,
) -> Subject:
    """The run's network (None: it comes later) and at most `limit` images of either set, evenly spread."""
    sets = [load_images(held_out.build(), plan.transform, limit)]
    sets += [] if isinstance(plan.data, ImageStream) or not with_training else [load_images(plan.data, plan.transform, limit)]
    images, *training = (Clean.of_images(conditioned(found, plan), plan.encoder, device) for found in sets)
    described = {"step": step, "weights": weights, "held_out": held_out.dump(), "parameterization": plan.parameterization}
    return Subject(
        denoiser or nn.Identity(), plan.schedule, plan.parameterization, plan.objective.variance, plan.conditioning, plan.shape,
        images, training[0] if training else None, plan.encoder, clips=plan.encoder is None,
        guidance=plan.sampling.guidance, block_size=plan.sampling.block_size, device=device, described=described,
    )


def conditioned(images: Images, plan: Plan) -> Images:
    """Images with what the network is conditioned on as labels: for a model of prompts, the numbers of their captions."""
    if plan.pipeline is None:
        return images
    if images.captions is None:
        raise InputError("the model takes prompts, but the images to look at have no captions. Write data with captions (captions: "
                         "sidecar, caption_column: ...).")
    return dataclasses.replace(images, labels=plan.conditioning.ids_of(images.captions))


def held_out_gap(plan: Plan, denoiser: nn.Module, step: int, weights: str, folder: Path, device: torch.device) -> None:
    """The denoising loss on held-out against training images, on a few hundred of each, into diagnostics.json. Collective."""
    part = DIAGNOSTICS.parse({"type": "denoising_error", **QUICK}, "diagnostics")
    subject = subject_of(plan, denoiser, step, weights, held_out_data(plan, None), QUICK["num"], device)
    result = finite(part.build()(subject))
    if is_main():
        write_atomically(folder / FILE, json.dumps({part.name: result}, indent=1) + "\n")


def held_out_data(plan: Plan, data: str | None) -> Part:
    """The data set of images that the run has not been trained on."""
    if data is not None:
        block = read_yaml(data, "--data") if data.lstrip().startswith("{") else {"type": "image_folder", "path": data}
        return DATASETS.parse(block, "--data")
    if plan.evaluation is None:
        raise InputError("the recipe has no evaluation: block, whose reference would be the held-out images. Give them with --data: a "
                         "folder, or a block such as '{type: digits, part: held_out}'.")
    return plan.evaluation.reference


def read_results(file: Path) -> dict[str, Any]:
    """What earlier calls wrote; nothing where there is no file. One that cannot be read is left for the person to judge."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}). Move it away.") from error
    return dict(found)


def finite(value: Any) -> Any:
    """Plain data for JSON: what is not finite is None, tuples are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else dump(value)


def shown(result: dict[str, Any]) -> str:
    keys = [key for key in ("value", "floor", "standard_error", "mean_rejected", "psnr") if isinstance(result.get(key), float)]
    return ", ".join(f"{'' if key == 'value' else key.replace('_', ' ') + ' '}{result[key]:.4g}" for key in keys) or "not finite"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.diagnose`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.diagnose", description="Diagnose a trained run on all processes.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--which", action="append", default=[], help="names, or a block; may be given several times")
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--data")
    given = parser.parse_intermixed_args(arguments)
    return leave(guarded(lambda: diagnose(given.run, given.which, given.overrides, given.step, given.weights == "ema", given.data)))


if __name__ == "__main__":
    sys.exit(main())
