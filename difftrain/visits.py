"""What is done with the averaged weights during training: a sample grid, an evaluation. The final score goes the same way."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain import runlog
from difftrain.diagnostics.denoising import DenoisingError
from difftrain.diagnostics.subject import Subject
from difftrain.distributed import is_main, num_processes, sum_over_processes
from difftrain.evaluation.evaluator import Evaluation, Evaluator
from difftrain.evaluation.scores import badness
from difftrain.evaluation.sources import GeneratedImages
from difftrain.registry import InputError, dump
from difftrain.sampling import SampleGenerator, blocks, contact_sheet, grid, to_pil

NEAREST_FILE = "nearest.png"


def generated_images(generator: SampleGenerator, denoiser: nn.Module, num: int, device: torch.device) -> Tensor:
    """Samples 0 .. num - 1 as pixels [num, C, H, W] or [num, C, F, H, W] uint8, on every process.

    Weights that are sharded need every process in each forward: there, a process without a block in the last round makes its first once
    more and drops it.
    """
    size = generator.sampling.block_size
    source = GeneratedImages(generator, denoiser, (), num, device)
    own = list(blocks(num, size))
    rounds = math.ceil(math.ceil(num / size) / num_processes())
    spare = rounds - len(own) if source.every_process_takes_part else 0
    made = source.blocks(own + [list(range(min(size, num)))] * spare)
    parts = {i: image for indices, block in zip(own, made, strict=False) for i, image in zip(indices, block.images, strict=True)}
    for _ in made:
        pass
    shape = next(iter(parts.values())).shape if parts else None
    if num_processes() > 1:
        import torch.distributed as dist

        shapes: list[Any] = [None] * num_processes()
        dist.all_gather_object(shapes, shape)
        shape = next(s for s in shapes if s is not None)
    assert shape is not None
    images = torch.zeros(num, *shape, dtype=torch.uint8)
    for i, image in parts.items():
        images[i] = image
    return sum_over_processes(images)


@dataclass
class Scorer:
    """Scores `num_samples` images of a network. The reference is opened before anything is generated."""

    generator: SampleGenerator
    evaluator: Evaluator
    shape: tuple[int, ...]
    num_samples: int
    device: torch.device

    def __call__(self, denoiser: nn.Module) -> Evaluation:
        sampling = self.generator.sampling
        described = {
            "sampler": dump(sampling.sampler), "seed": sampling.seed, "block_size": sampling.block_size, "guidance": sampling.guidance
        }  # fmt: skip
        return self.evaluator(GeneratedImages(self.generator, denoiser, self.shape, self.num_samples, self.device), described)


def save_worst(evaluation: Evaluation, file: Path) -> None:
    """The picture of the generated images nearest to training images, where they were looked for."""
    if is_main() and evaluation.worst is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil(evaluation.worst).save(file)


@dataclass
class SampleGrid:
    """Writes samples 0 .. num - 1 as samples/step-NNNNNNN.png: the same noise at every step, so that one sees it learn."""

    every: int
    generator: SampleGenerator
    num: int
    folder: Path
    device: torch.device

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        images = generated_images(self.generator, denoiser, self.num, self.device)
        if is_main():
            save_grid(images, self.folder / f"step-{step:07d}.png", self.generator.conditioning.num_classes)


def save_grid(images: Tensor, file: Path, num_classes: int | None) -> None:
    """Images: one column a class where that fits, else about square. Clips: a contact sheet."""
    columns = num_classes if num_classes and num_classes <= 20 else math.ceil(math.sqrt(len(images)))
    file.parent.mkdir(parents=True, exist_ok=True)
    to_pil(contact_sheet(images) if images.ndim == 5 else grid(images, min(columns, len(images)))).save(file)


@dataclass
class InLoopEvaluation:
    """Scores the averaged weights during training; the selected score picks the best checkpoint."""

    every: int
    scorer: Scorer
    select: Callable[[dict[str, dict[str, Any]]], float] | None
    weights: str
    file: Path
    mark: str | None = None  # of the protocol of the last scores

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> float | None:
        started = time.perf_counter()
        evaluation = self.scorer(denoiser)
        seconds = time.perf_counter() - started
        value = self.select(evaluation.scores) if self.select else None
        found = evaluation.to_json(step)
        self.mark = found["protocol_digest"]
        record = {
            **found, "weights": self.weights, "selected_by": value,
            "wall": {"seconds": seconds, "share": seconds / max(training_seconds, 1e-9)},
        }
        if is_main():
            runlog.append(self.file, record)
            shown = ", ".join(f"{name} {score['value']:.4g}" for name, score in evaluation.scores.items())
            print(f"step {step}: {shown}", flush=True)
        return value


@dataclass
class HeldOutLoss:
    """Writes the denoising loss on held-out images to validation.jsonl, by timestep and by band of log-SNR: the same noise every time."""

    every: int
    subject: Subject
    measure: DenoisingError
    file: Path

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        found = self.measure(dataclasses.replace(self.subject, denoiser=denoiser))
        if is_main():
            runlog.append(self.file, {"step": step, **{key: found[key] for key in ("value", "t", "log_snr", "held_out", "bands")}})


@dataclass(frozen=True)
class Selection:
    """The score by which the best checkpoint is chosen, as a value of which smaller is better."""

    name: str

    def __call__(self, scores: dict[str, dict[str, Any]]) -> float:
        if self.name not in scores:
            raise InputError(f"evaluation.in_loop.select: there is no score {self.name!r}; the metrics give {', '.join(scores)}.")
        return badness(self.name, float(scores[self.name]["value"]))
