"""Scores of a network: in the loop, where they pick the best checkpoint, and at the end."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import append, write_beside
from difftrain.core.processes import is_main
from difftrain.diagnostics.base import Subject
from difftrain.diagnostics.denoising_error import DenoisingError
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.slots import badness
from difftrain.evaluation.sources import GeneratedSamples
from difftrain.generation.conditions import Conditions
from difftrain.generation.generator import SampleGenerator
from difftrain.generation.pictures import to_pil
from difftrain.training.callbacks import Callback

NEAREST_FILE = "nearest.png"
logger = wing_logger(__name__)


@dataclass
class Scorer:
    """Scores generated samples of a network.

    Args:
        generator: Generates the samples.
        evaluator: Scores them against a reference, which is open already.
        shape: Shape of one sample.
        num_samples: Number of samples.
        device: Where the network is.
        conditions: The class or prompt of each sample; None for a network that takes neither.
        lora_scale: Scale of the network's LoRA; None where it has none.
        key: What else decides the samples, so that rows of others are not used again: plain data.
    """

    generator: SampleGenerator
    evaluator: Evaluator
    shape: tuple[int, ...]
    num_samples: int
    device: torch.device
    conditions: Conditions | None = None
    lora_scale: float | None = None
    key: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, denoiser: nn.Module) -> Evaluation:
        """Generate the samples and score them. Collective."""
        samples = GeneratedSamples(
            self.generator,
            denoiser,
            self.shape,
            self.num_samples,
            self.device,
            self.conditions,
            self.lora_scale,
        )
        evaluation = self.evaluator(samples, samples.described(), dict(self.key))
        self.generator.conditioning.release()
        if self.conditions is None:
            return evaluation
        protocol = {**evaluation.protocol, "labels": self.conditions.compared()}
        return dataclasses.replace(evaluation, protocol=protocol)


def save_worst(evaluation: Evaluation, file: Path) -> None:
    """Save the picture of the samples nearest to training images, where they were looked for."""
    if is_main() and evaluation.worst is not None:
        with write_beside(file) as beside:
            to_pil(evaluation.worst).save(beside)


class InLoopEvaluation(Callback):
    """Scores the averaged weights during training. The selected score picks the best checkpoint.

    Args:
        every: Steps between two evaluations.
        scorer: Scores the network.
        select: Name of the score that picks the best checkpoint; None picks none.
        weights: Which weights these are, "ema" or "model".
        file: A JSON-lines file for the scores.
    """

    def __init__(self, every: int, scorer: Scorer, select: str | None, weights: str, file: Path):
        self.every = every
        self.scorer = scorer
        self.select = select
        self.weights = weights
        self.file = file
        self.seconds = 0.0  # of all evaluations since the start

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> float | None:
        """Score the network, and return the selected score so that smaller is better.

        Raises:
            InputError: If the selected score could not be computed.
        """
        started = time.perf_counter()
        evaluation = self.scorer(denoiser)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        value = None if self.select is None else self._selected(evaluation)
        found = evaluation.to_json(step)
        self.protocol = found["protocol_digest"]
        record = {
            **found,
            "weights": self.weights,
            "selected_by": value,
            "wall": {"seconds": seconds, "share": self.seconds / (self.seconds + training_seconds)},
        }
        if is_main():
            append(self.file, record)
        scores = [f"{name} {score['value']:.4g}" for name, score in evaluation.scores.items()]
        logger.info(f"step {step}: {', '.join(scores)}")
        return value

    def _selected(self, evaluation: Evaluation) -> float:
        assert self.select is not None
        if self.select in evaluation.failures:
            reason = evaluation.failures[self.select].reason
            raise InputError(f"evaluation.in_loop.select: {self.select} failed: {reason}")
        if self.select not in evaluation.scores:
            known = ", ".join(evaluation.scores)
            raise InputError(
                f"evaluation.in_loop.select: there is no score {self.select!r}. The metrics give "
                f"{known}."
            )
        score: dict[str, Any] = evaluation.scores[self.select]
        return badness(score["better"], float(score["value"]))


class HeldOutLoss(Callback):
    """Records the denoising loss on held-out data, by timestep and by band of log-SNR.

    The noise is the same at every call.

    Args:
        every: Steps between two measurements.
        subject: The run, with its held-out data.
        measure: Measures the loss.
        file: A JSON-lines file for the results.
    """

    def __init__(self, every: int, subject: Subject, measure: DenoisingError, file: Path):
        self.every = every
        self.subject = subject
        self.measure = measure
        self.file = file

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        """Measure the loss of the network and append it to the file."""
        found = self.measure(dataclasses.replace(self.subject, denoiser=denoiser))
        keys = ("value", "t", "log_snr", "held_out", "bands")
        if is_main():
            append(self.file, {"step": step, **{key: found[key] for key in keys}})
