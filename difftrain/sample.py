"""Samples of a trained run: `difftrain sample RUN --num N --out DIR`, or `accelerate launch -m difftrain.sample ...`.

Sample i is keyed by its index: the same picture or clip on any number of processes, and more samples later continue the set.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.adapters import NAME
from difftrain.conditioning import Conditioning
from difftrain.data.video_file import write_clip
from difftrain.denoisers import DiffusersDenoiser
from difftrain.distributed import is_main, sum_over_processes
from difftrain.entry import DONE, guarded, join_processes, leave, say
from difftrain.lora.files import load_lora, located, refuse_unreadable, set_scales
from difftrain.pipelines.truncation import truncated
from difftrain.plan import Plan
from difftrain.registry import InputError
from difftrain.sampling import blocks, to_pil
from difftrain.visits import save_grid
from difftrain.weights import TrainedRun

GRID = 100  # images shown in the grid; of clips, frames
GRID_FILE = "grid.png"


@dataclass(frozen=True)
class Asked:
    """What is asked of all samples: a class, or one of several prompts in turn; and LoRAs, that of the run at `lora_scale`, others as
    FILE or FILE:SCALE, where FILE may be a run's folder."""

    label: int | None = None
    prompts: Sequence[str] = ()
    lora_scale: float | None = None
    loras: Sequence[str] = ()

    def labels(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor | None:
        if self.prompts:
            return conditioning.ids_of([self.prompts[i % len(self.prompts)] for i in indices])
        return torch.full((len(indices),), self.label) if self.label is not None else None

    def check(self, plan: Plan) -> None:
        """Refuse what the run's model does not take."""
        conditioning = plan.conditioning
        classes = conditioning.num_classes if conditioning.conditions else None
        if self.label is not None and not (classes and 0 <= self.label < classes):
            known = f"0 to {classes - 1}" if classes else "none: the model takes no labels"
            raise InputError(f"--label {self.label}: the run's classes are {known}.")
        if self.prompts and plan.pipeline is None:
            raise InputError(f"--prompt {self.prompts[0]!r}: the model {plan.recipe.model.name} takes no prompts. Leave --prompt out.")
        if self.lora_scale is not None and not (plan.adapter and plan.adapter.makes_lora):
            raise InputError(f"--lora-scale {self.lora_scale}: the run did not train a LoRA. Leave --lora-scale out.")
        if self.lora_scale is not None and not math.isfinite(self.lora_scale):
            raise InputError(f"--lora-scale {self.lora_scale}: expected a finite number, such as 0.8.")
        for text in self.loras:
            check_lora(text)

    def cut_off(self, plan: Plan) -> str | None:
        """What is to be told of prompts that text encoders do not read to their end."""
        return truncated(self.prompts, plan.pipeline.tokenize, "prompts") if plan.pipeline is not None else None

    def apply(self, denoiser: DiffusersDenoiser, plan: Plan) -> dict[str, nn.Module]:
        """Set the scale, and add the other LoRAs; returns the frozen text encoders, where these may have changed."""
        if self.lora_scale is not None:
            set_scales(denoiser, {NAME: self.lora_scale})
        frozen_text = plan.pipeline is not None and bool(self.loras) and not plan.trains_text
        encoders = dict(plan.pipeline.text.encoders.items()) if plan.pipeline is not None and frozen_text else {}
        for n, text in enumerate(self.loras):
            file, scale = with_scale(text)
            load_lora(denoiser, Path(file).expanduser(), scale, f"lora_{n}", encoders)
        return encoders


def check_lora(text: str) -> None:
    """Refuse what names no LoRA file, or a scale that is not finite."""
    file, scale = with_scale(text)
    if not file or not Path(file).expanduser().exists():
        raise InputError(f"--lora {text or repr(text)}: there is no file or folder {file!r}. Write FILE.safetensors, "
                         "FILE.safetensors:0.5, or the folder of a run that trained a LoRA.")
    if not math.isfinite(scale):
        raise InputError(f"--lora {text}: the scale {scale} is not a finite number. Write {file}:0.5.")
    refuse_unreadable(located(file))


def with_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def sample(
    run: str, num: int, out: str, overrides: Sequence[str] = (), asked: Asked | None = None, step: int | None = None, averaged: bool = True
) -> int:
    """Write num PNGs (clips: MP4, without PyAV GIF) and a grid. overrides: of the run's recipe, such as sampling.seed=1."""
    if num < 1:
        raise InputError(f"--num {num}: expected at least 1.")
    asked = asked or Asked()
    device = join_processes()
    trained = TrainedRun(run, list(overrides))
    generator, conditioning = trained.plan.generator, trained.plan.conditioning
    asked.check(trained.plan)
    chosen = trained.chosen_step(step)
    folder = made(Path(out).expanduser(), "--out")
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    asked.apply(denoiser, trained.plan)
    say(f"{num} samples of step {chosen} ({weights} weights)")
    if (cut := asked.cut_off(trained.plan)) is not None:
        say(f"text: {cut}")
    most = max(1, GRID // (trained.plan.num_frames or 1))
    shown = torch.zeros(min(num, most), *trained.plan.image_shape, dtype=torch.uint8)
    for indices in blocks(num, generator.sampling.block_size):
        labels = asked.labels(indices, conditioning)
        for i, image in zip(indices, generator(denoiser, indices, device, labels), strict=True):
            save(image, folder / f"{i:06d}")
            if i < len(shown):
                shown[i] = image
    shown = sum_over_processes(shown)
    if is_main():
        save_grid(shown, folder / GRID_FILE, None if asked.label is not None else conditioning.num_classes)
    say(f"written to {folder}; {folder / GRID_FILE} shows the first {len(shown)}")
    return DONE


def save(sample: Tensor, stem: Path) -> None:
    """An image [C, H, W] as `stem`.png, or a clip [C, F, H, W] as a video file."""
    if sample.ndim == 4:
        write_clip([to_pil(frame) for frame in sample.transpose(0, 1)], stem)
    else:
        to_pil(sample).save(stem.with_suffix(".png"))


def made(folder: Path, option: str) -> Path:
    """The folder, made if need be; found out before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{option}: the folder {str(folder)!r} cannot be written to ({error.strerror}). Write another one.") from error
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.sample`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.sample", description="Generate samples of a trained run.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num", "--num-samples", type=int, required=True, help="under torchrun write --num-samples")
    parser.add_argument("--out", required=True)
    parser.add_argument("--label", type=int)
    parser.add_argument("--prompt", action="append", default=[], help="of text-to-image runs; several are taken in turn")
    parser.add_argument("--lora-scale", type=float, help="of the run's own LoRA; 0: the base model")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                        help="another LoRA on top, a file or the folder of a run; several are added up")
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    given = parser.parse_intermixed_args(arguments)
    asked = Asked(given.label, given.prompt, given.lora_scale, given.lora)
    return leave(guarded(lambda: sample(given.run, given.num, given.out, given.overrides, asked, given.step, given.weights == "ema")))


if __name__ == "__main__":
    sys.exit(main())
