"""Samples of a trained run: pictures, clips or tensors, with LoRAs on top.

Sample i is keyed by its index: it is the same on any number of processes, and more samples later
continue the set.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import writable_folder, write_beside
from difftrain.core.launch import join_processes
from difftrain.core.processes import barrier, is_main, on_main, sum_over_processes
from difftrain.data.datasets.folder import GRID_FILE
from difftrain.generation.generator import blocks
from difftrain.generation.pictures import save_grid, to_pil
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.model import DenoiserNetwork
from difftrain.run.lora_scale import check_lora_scale, set_lora_scale
from difftrain.run.model import ModelPlan
from difftrain.run.sample_folder import SAMPLES_FILE, SCATTER_FILE, SampleFolder
from difftrain.run.trained import TrainedRun

GRID = 100  # images that the grid shows; of clips, frames
logger = wing_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a command line asks of all samples: label, prompts, LoRAs.

    Args:
        label: One class for all samples; None takes the classes in turn.
        prompts: Prompts, taken in turn; empty takes those of the recipe.
        lora_scale: Scale of the run's own LoRA; None leaves it as it is.
        loras: Further LoRAs, each FILE or FILE:SCALE, where FILE may be a run's folder.
    """

    label: int | None = None
    prompts: Sequence[str] = ()
    lora_scale: float | None = None
    loras: Sequence[str] = ()

    def labels(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor | None:
        """Return the labels [B] of the samples of these indices; None for classes in turn."""
        if self.prompts:
            return conditioning.ids_of([self.prompts[i % len(self.prompts)] for i in indices])
        if self.label is not None:
            return torch.full((len(indices),), self.label)
        return None

    def shown(self, num: int, model: ModelPlan, folder: Path) -> list[dict[str, Any]]:
        """Return what each sample in a folder was asked to show, by its file.

        Args:
            num: Number of samples.
            model: The run's model.
            folder: The folder, in which the first sample is.

        Returns:
            [{"file_name", "text"}] of prompts, [{"file_name", "label"}] of classes; [] where the
            model takes neither.
        """
        conditioning, indices = model.conditioning, range(num)
        if not conditioning.conditions:
            return []
        labels = self.labels(indices, conditioning)
        if labels is None:
            labels = conditioning.labels_of(indices)
        assert labels is not None
        texts = conditioning.captions_of(labels)
        ending = next(folder.glob(f"{stem_of(0)}.*")).suffix
        records: list[dict[str, Any]] = []
        for i in indices:
            record = {"file_name": stem_of(i) + ending}
            if texts is None:
                records.append({**record, "label": int(labels[i])})
            else:
                records.append({**record, "text": texts[i]})
        return records

    def check(self, model: ModelPlan) -> None:
        """Refuse what the run's model does not take.

        Raises:
            InputError: With what to write instead.
        """
        conditioning = model.conditioning
        classes = conditioning.num_classes if conditioning.conditions else None
        if self.label is not None and not (classes and 0 <= self.label < classes):
            if not classes:
                raise InputError(
                    f"--label {self.label}: the model takes no class labels. Leave --label out."
                )
            raise InputError(
                f"--label {self.label}: the run has the classes 0 to {classes - 1}. Write one of "
                "them."
            )
        if self.prompts and not model.model.takes_prompts:
            raise InputError(
                f"--prompt {self.prompts[0]!r}: the model {model.model.name} takes no prompts. "
                "Leave --prompt out."
            )
        check_lora_scale(self.lora_scale, model)
        for text in self.loras:
            check_lora(text)

    def cut_off(self, model: ModelPlan) -> str | None:
        """Return a sentence about prompts that are longer than the text encoders read."""
        from difftrain.models.pipelines.truncation import truncated

        tokenizer = model.model.tokenizer
        return None if tokenizer is None else truncated(self.prompts, tokenizer, "prompts")

    def apply(self, denoiser: DenoiserNetwork, model: ModelPlan) -> dict[str, nn.Module]:
        """Set the scale of the run's LoRA, and add the other LoRAs.

        Returns:
            The frozen text encoders by folder, where a LoRA may have changed them.
        """
        if self.lora_scale is None and not self.loras:
            return {}
        from difftrain.models.lora.files import load_lora

        set_lora_scale(denoiser, self.lora_scale)
        encoders: dict[str, nn.Module] = {}
        text = model.model.text if self.loras and not model.trains_text else None
        if text is not None:
            encoders = dict(text.encoders.items())
        for n, given in enumerate(self.loras):
            file, scale = with_scale(given)
            load_lora(denoiser, Path(file).expanduser(), scale, f"lora_{n}", encoders)
        return encoders


def check_lora(text: str) -> None:
    """Refuse an option that names no LoRA file, or a scale that is not finite."""
    from difftrain.models.lora.files import located, refuse_unreadable

    file, scale = with_scale(text)
    if not file or not Path(file).expanduser().exists():
        raise InputError(
            f"--lora {text or repr(text)}: there is no file or folder {file!r}. Write "
            "FILE.safetensors, FILE.safetensors:0.5, or the folder of a run that trained a LoRA."
        )
    if not math.isfinite(scale):
        raise InputError(
            f"--lora {text}: the scale {scale} is not a finite number. Write {file}:0.5."
        )
    refuse_unreadable(located(file))


def with_scale(text: str) -> tuple[str, float]:
    """Split FILE or FILE:SCALE."""
    file, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return file, float(scale)
    except ValueError:
        return text, 1.0


def sample_run(
    run: str,
    num: int,
    out: str,
    overrides: Sequence[str] = (),
    asked: Asked | None = None,
    step: int | None = None,
    averaged: bool = True,
    overwrite: bool = False,
) -> None:
    """Write samples of a trained run into a folder, and a picture that shows them.

    samples.json there says what made them.

    Args:
        run: The run folder.
        num: Number of samples.
        out: The folder for the samples: PNGs, clips as MP4 (without PyAV as GIF), tensors as one
            samples.npy.
        overrides: Changes of the run's recipe, such as "sampling.seed=1".
        asked: What is asked of the samples.
        step: Step of the checkpoint; None for that of the final weights.
        averaged: Whether averaged weights are wanted, if there are any.
        overwrite: Whether earlier samples in the folder are replaced.

    Raises:
        InputError: If what is asked cannot be done, or if the folder holds other files.
    """
    if num < 1:
        raise InputError(f"--num {num}: expected at least 1.")
    asked = asked or Asked()
    device = join_processes()
    # The run, its weights, and what is asked of it
    trained = TrainedRun(run, overrides, needs_lora=bool(asked.loras))
    model = trained.model
    asked.check(model)
    chosen = trained.chosen_step(step)
    folder = writable_folder(Path(out).expanduser(), "--out")
    target = SampleFolder(folder)
    on_main(lambda: target.check(overwrite))
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    asked.apply(denoiser, model)
    logger.info(f"{num} samples of step {chosen} ({weights} weights)")
    cut_off = asked.cut_off(model)
    if cut_off is not None:
        logger.info(f"text: {cut_off}")
    # The samples, each saved by the process that generates it
    made = {
        "run": str(trained.folder.resolve()),
        "step": chosen,
        "weights": weights,
        "num": num,
        "sampling": trained.recipe.dump()["sampling"],
        "asked": dataclasses.asdict(asked),
    }
    on_main(lambda: target.begin(made))
    is_tensor = model.facts.items == "tensors"
    num_shown = num if is_tensor else min(num, max(1, GRID // (model.facts.num_frames or 1)))
    dtype = torch.float32 if is_tensor else torch.uint8
    shown = torch.zeros(num_shown, *model.item, dtype=dtype)
    for indices in blocks(num, model.generator.sampling.block_size):
        labels = asked.labels(indices, model.conditioning)
        samples = model.generator(denoiser, indices, device, labels)
        for i, sample in zip(indices, samples, strict=True):
            if not is_tensor:
                save_sample(sample, folder / stem_of(i))
            if i < num_shown:
                shown[i] = sample
    # The picture of all of them
    shown = sum_over_processes(shown)
    file = folder / (SCATTER_FILE if is_tensor else GRID_FILE)
    if is_main():
        num_classes = None if asked.label is not None else model.conditioning.num_classes
        save_grid(shown, file, num_classes)
        if is_tensor:
            save_tensors(shown, folder / SAMPLES_FILE)
    barrier()  # every sample is there
    if not is_tensor:
        on_main(lambda: target.write_shown(asked.shown(num, model, folder)))
    on_main(lambda: target.end(made))
    logger.info(f"written to {folder}; {file} shows the first {num_shown}")


def stem_of(index: int) -> str:
    """Return the name of a sample's file without its extension."""
    return f"{index:06d}"


def save_sample(sample: Tensor, stem: Path) -> None:
    """Save an image [C, H, W] as `stem`.png, or a clip [C, F, H, W] as a video file."""
    if sample.ndim == 4:
        from difftrain.data.datasets.video_file import write_clip

        write_clip([to_pil(frame) for frame in sample.transpose(0, 1)], stem)
    else:
        to_pil(sample).save(stem.with_suffix(".png"))


def save_tensors(samples: Tensor, file: Path) -> None:
    """Save tensors [N, ...] as a NumPy file."""
    with write_beside(file) as beside:
        np.save(beside, samples.numpy())
