"""The training loop, in the order in which things happen.

One backward per micro-batch on the sum of all terms, one update per step. Random draws, learning
rate and decay of the average are functions of the step, so that resuming needs no more than the
weights, their average, the optimizer and the state of the objective.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from difftrain.core.console import ProgressBar
from difftrain.core.files import append, cut_after
from difftrain.core.launch import check_strategy
from difftrain.core.processes import barrier, max_over_processes, mean_over_processes
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.data.items import Dataset
from difftrain.data.loader import Loader
from difftrain.data.unreadable import SKIPPED_FILE, ReadErrors
from difftrain.models.model import DenoiserNetwork
from difftrain.objective.objective import Objective
from difftrain.objective.types import Batch, Losses
from difftrain.training import checkpoint
from difftrain.training.batches import Preparation, TorchItems
from difftrain.training.callbacks import Callback
from difftrain.training.ema import Decay, WeightAverage
from difftrain.training.log import Window
from difftrain.training.lr import Constant, LearningRate
from difftrain.training.settings import Training
from difftrain.training.signals import StopRequest

LOGS = ("log.jsonl", "evaluations.jsonl", "validation.jsonl")


class NotFinite(RuntimeError):
    """A term of the loss, or the gradient, is not finite; raised before the update."""


@runtime_checkable
class Batches(Protocol):
    """Anything that yields the micro-batches of this process, such as a `Loader`."""

    def batches(self, start_step: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches from `start_step` on, in order, without end."""
        ...


@dataclass
class Progress:
    """The trainer's own state.

    Attributes:
        step: Number of finished updates.
        best_step: Step of the best checkpoint, if a callback picks it.
        best_value: Its value; smaller is better.
        best_protocol: The protocol of that value. Values of other protocols are not compared with
            it.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best_protocol: str | None = None


class Trainer:
    """Trains a network under an objective, and resumes from the latest checkpoint in its folder.

    It works with or without a recipe, on one process or on several that a launcher started:

        settings = Training(steps=1000, batch_size=64)
        trainer = Trainer(network, objective, dataset, optimizer, settings, "runs/mine")
        trainer.train()

    Args:
        denoiser: The network, called as (x_t [B, ...], time [B], cond).
        objective: The loss.
        data: A `Loader`, or a map-style data set of tensors: x0, (x0, label), or a mapping with
            "x0".
        optimizer: An optimizer of the network's parameters. The learning rate of each group is what
            the schedule scales.
        settings: How long, in what batches, and what is written.
        folder: Where checkpoints and the log go.
        seed: Seed of the data order and of all draws.
        accelerator: accelerate's view of processes and precision; None makes one.
        learning_rate: Factor on the learning rate as a function of the step.
        ema: Decay of the running average of the weights; None keeps no average.
        callbacks: What happens at regular steps, with the averaged weights.
        prepare: Turns micro-batches into batches; None passes labels on as "class_labels".
        recipe: Text that is kept in each checkpoint.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        objective: Objective,
        data: Any,
        optimizer: torch.optim.Optimizer,
        settings: Training,
        folder: str | Path,
        *,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        learning_rate: LearningRate | None = None,
        ema: Decay | None = None,
        callbacks: Sequence[Callback] = (),
        prepare: Preparation | None = None,
        recipe: str = "",
    ):
        check_strategy()
        self.accelerator = accelerator or Accelerator()
        check_strategy(self.accelerator)
        self.settings, self.folder, self.seed = settings, Path(folder), seed
        self.skipped = ReadErrors("skip", self.folder / SKIPPED_FILE)
        self.learning_rate = learning_rate or Constant()
        self.callbacks, self.recipe = list(callbacks), recipe
        device, num_processes = self.accelerator.device, self.accelerator.num_processes
        # The parts, where they compute
        self.loader = self._loader(data)
        self.objective = objective.to(device)
        self.prepare = (prepare or Preparation()).to(device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.model, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        # Once, not in every step: a LoRA adds thousands of modules, and walking through them takes
        # time.
        self.model.train()
        self.parameters = list(self.model.parameters())
        # Without accelerate's own autocast around the network: the objective runs under autocast as
        # a whole, and a regularizer may leave it.
        self.bare: nn.Module = self.accelerator.unwrap_model(
            self.model, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        self.average = WeightAverage(self.bare, ema) if ema is not None else None
        micro_batch = settings.micro_batch_of(num_processes)
        self.num_micro = settings.batch_size // (micro_batch * num_processes)
        # State and clocks
        self.window = Window(device)
        self.progress = Progress()
        self.stop = StopRequest()
        self.seconds = {"training": 0.0, "callbacks": 0.0}
        self.logged = (0, 0.0)  # step and training seconds at the last line of the log
        others: dict[str, Any] = {"objective": self.objective, "window": self.window}
        if self.accelerator.scaler is not None:
            others["scaler"] = self.accelerator.scaler
        self.snapshot = checkpoint.Snapshot(
            self.bare, self.optimizer.optimizer, self.average, others
        )

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def train(self) -> bool:
        """Resume from the latest checkpoint, if there is one, and train to the last step.

        Returns:
            False if a signal stopped the run after saving.
        """
        self.resume()
        return self.run()

    def resume(self, forget_best: bool = False) -> int:
        """Continue from the latest whole checkpoint, if there is one.

        Args:
            forget_best: Whether the search for the best checkpoint starts again.

        Returns:
            The number of finished steps.

        Raises:
            InputError: If the checkpoint does not fit this trainer.
        """
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            self.progress = Progress(**self.snapshot.load(newest))
        if forget_best:
            self.progress = Progress(self.progress.step)
        if self.accelerator.is_main_process:
            for name in LOGS:
                cut_after(self.folder / name, self.progress.step)
        barrier()  # nothing is appended before it is cut
        return self.progress.step

    def run(self) -> bool:
        """Train to the last step.

        Returns:
            False if a signal stopped the run after saving.

        Raises:
            NotFinite: If a term of the loss, or the gradient, is not finite.
        """
        self.logged = (self.progress.step, self.seconds["training"])
        batches = self.loader.batches(self.progress.step)
        with self.stop.listening(), contextlib.closing(batches):  # type: ignore[type-var]
            bar = ProgressBar(
                self.settings.steps,
                self.progress.step,
                self.accelerator.is_main_process,
                "step",
            )
            while self.progress.step < self.settings.steps and not self.stop.agreed:
                # Update
                started = time.perf_counter()
                norm = self.step(batches)
                self.progress.step += 1
                self.seconds["training"] += time.perf_counter() - started
                # Log
                if self._is_due(self.settings.log_every):
                    record = self._log(norm)
                    speed = record["wall"]["images_per_second"]
                    bar.show(self.progress.step, f"loss {record['loss']:.4f}  {speed:.0f} images/s")
                # Look at the averaged weights, and save
                improved = self._call_back()
                saves = self._is_due(self.settings.checkpoint_every)
                if saves or improved or self.stop.agreed:
                    self.save()
            bar.close()
            # A signal may also have come in the last step.
            return not bool(max_over_processes(torch.tensor(float(self.stop.requested))))

    def step(self, batches: Iterator[MicroBatch]) -> Tensor:
        """Make one update on one global batch.

        Args:
            batches: This process's micro-batches, from this step on.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            NotFinite: If a term of the loss, or the gradient, is not finite.
        """
        step = self.progress.step
        # Schedule-free optimizers have other weights where gradients are taken.
        self.optimizer.train()
        finite: dict[str, Tensor] = {}
        seen: list[Losses] = []
        before = {name: value.clone() for name, value in self.objective.state_dict().items()}
        # One backward per micro-batch; gradients are reduced over processes in the last one alone.
        with self.objective.context():
            for m in range(self.num_micro):
                batch, rng = self._batch(next(batches), step)
                is_last = m == self.num_micro - 1
                sync = contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)
                with sync, self.accelerator.autocast():
                    losses = self.objective(self.model, batch, rng)
                self.accelerator.backward(losses.total / self.num_micro)
                seen.append(replace(losses, total=losses.total.detach()))
                for name, term in losses.terms.items():
                    finite[name] = torch.isfinite(term) & finite.get(name, True)
        # Checks before the update
        norm = self.accelerator.clip_grad_norm_(
            self.parameters, self.settings.clip_norm or float("inf")
        )
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._refuse_what_is_not_finite(finite, norm, before)
        for losses in seen:
            self.window.add(losses)
        # The update, and the average of the weights
        factor = self.learning_rate(step, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step, self.settings.batch_size)
        return norm

    def save(self) -> None:
        """Write a checkpoint of the state after the finished steps, then remove older ones."""
        self.optimizer.eval()  # of schedule-free optimizers: the averaged weights, the result
        state = {name: value for name, value in vars(self.progress).items() if name != "step"}
        self.snapshot.save(self.checkpoints, self.progress.step, state, self.recipe)
        if self.accelerator.is_main_process:
            best = self.progress.best_step
            protected = set() if best is None else {best}
            checkpoint.rotate(self.checkpoints, self.settings.keep_checkpoints, protected)

    def _loader(self, data: Any) -> Batches:
        """Return `data`, or a loader of the data set that it is."""
        if isinstance(data, Batches):
            return data
        dataset = data if isinstance(data, Dataset) else TorchItems(data)
        num_processes = self.accelerator.num_processes
        return Loader(
            dataset,
            None,
            seed=self.seed,
            batch_size=self.settings.batch_size,
            micro_batch_size=self.settings.micro_batch_of(num_processes),
            process_index=self.accelerator.process_index,
            num_processes=num_processes,
        )

    def _batch(self, micro: MicroBatch, step: int) -> tuple[Batch, Rng]:
        """Return the objective's batch of a micro-batch, and the draws of its samples."""
        rng = Rng(self.seed, step, micro.samples, self.settings.batch_size)
        if micro.skipped:
            self.skipped.add(micro.skipped)
        wide = torch.promote_types(self._input_dtype(), torch.float32)
        return self.prepare(micro, rng, self.accelerator.device, wide), rng

    def _input_dtype(self) -> torch.dtype:
        if isinstance(self.bare, DenoiserNetwork):
            return self.bare.dtype
        return next(self.bare.parameters()).dtype

    def _refuse_what_is_not_finite(
        self, finite: dict[str, Tensor], norm: Tensor, before: dict[str, Tensor]
    ) -> None:
        """Reduce all finite checks and the stop flag in one call: all ranks stop together."""
        scales = torch.tensor(self.accelerator.scaler is not None, device=norm.device)
        checks = {**finite, "gradient norm": torch.isfinite(norm) | scales}
        flags = [~check.to(norm.device) for check in checks.values()]
        flags.append(torch.tensor(self.stop.requested, device=norm.device))
        *bad, stop = max_over_processes(torch.stack(flags).float()).tolist()
        self.stop.agreed = bool(stop)
        names = [name for name, flag in zip(checks, bad, strict=True) if flag]
        if not names:
            return
        self.optimizer.zero_grad()
        self.objective.load_state_dict(before)  # a running mean may have taken the bad value up
        self.save()
        saved = checkpoint.folder_of(self.checkpoints, self.progress.step)
        verb = "is" if len(names) == 1 else "are"
        raise NotFinite(
            f"step {self.progress.step + 1}: {' and '.join(names)} {verb} not finite. Training "
            f"stopped before the update; the weights before it are in {saved}. Lower "
            "the learning rate, add warm-up (lr_schedule), or train in bf16 or float32. A run of a "
            "recipe then goes on with --accept-changes."
        )

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step % every == 0 or step == self.settings.steps

    def _log(self, norm: Tensor) -> dict[str, Any]:
        """Append this window's means to the log. Collective."""
        terms, measures, bands = self.window.means()
        self.window.reset()
        step, seconds = self.progress.step, self.seconds["training"]
        new_steps, new_seconds = step - self.logged[0], seconds - self.logged[1]
        self.logged = (step, seconds)
        speed = new_steps * self.settings.batch_size / max(new_seconds, 1e-9)
        record = {
            "step": step,
            "loss": terms.pop("loss"),
            "terms": terms,
            "measures": measures,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": mean_over_processes(norm).item(),
            "images": step * self.settings.batch_size,
            "bands": bands,
            "wall": {"seconds": sum(self.seconds.values()), "images_per_second": speed},
        }
        if self.accelerator.is_main_process:
            append(self.folder / "log.jsonl", record)
            flat = {key: record[key] for key in ("loss", "lr", "grad_norm")}
            flat |= {f"terms/{name}": value for name, value in terms.items()}
            flat |= {f"measures/{name}": value for name, value in measures.items()}
            self.accelerator.log(flat, step=step)
        return record

    def _call_back(self) -> bool:
        """Call the callbacks that are due, with the averaged weights.

        Returns:
            Whether one of them found a new best checkpoint.
        """
        due = [callback for callback in self.callbacks if self._is_due(callback.every)]
        if not due:
            return False
        started, improved = time.perf_counter(), False
        self.model.eval()
        self.optimizer.eval()
        applied = contextlib.nullcontext() if self.average is None else self.average.applied()
        with applied:
            for callback in due:
                value = callback(self.bare, self.progress.step, self.seconds["training"])
                if value is not None and self._is_best(value, callback.protocol):
                    self.progress = Progress(
                        self.progress.step, self.progress.step, value, callback.protocol
                    )
                    improved = True
        self.model.train()
        self.seconds["callbacks"] += time.perf_counter() - started
        return improved

    def _is_best(self, value: float, protocol: str | None) -> bool:
        is_comparable = protocol == self.progress.best_protocol
        best = self.progress.best_value if is_comparable else None
        return value < (math.inf if best is None else best)
