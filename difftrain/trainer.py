"""The loop, in the order in which things happen.

One backward per micro-batch on the sum of all terms, one update per step; what is drawn, the learning rate and the decay
are functions of the step, so that resuming needs no more than the weights, their average and the optimizer.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from difftrain import checkpoint, runlog
from difftrain.batch import Batch, Losses
from difftrain.data.loader import MicroBatch
from difftrain.distributed import barrier, max_over_processes, mean_over_processes
from difftrain.ema import WeightAverage
from difftrain.lr import LearningRate
from difftrain.objective import Objective
from difftrain.preparation import Preparation
from difftrain.progress import ProgressBar
from difftrain.registry import InputError, NonNegativeInt, Positive, PositiveInt
from difftrain.rng import Rng


@dataclass(frozen=True)
class Training:
    """How long and in what batches. batch_size is global; micro_batch_size is per process and backward (default: all of it).

    clip_norm: the gradient's largest norm. checkpoint_every, log_every, sample_every count steps; keep_checkpoints are kept
    beside the best one.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    clip_norm: Positive | None = 1.0
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    sample_every: PositiveInt | None = None
    num_sampled: NonNegativeInt = 64
    trackers: list[str] = field(default_factory=list)

    def micro_batch_of(self, num_processes: int) -> int:
        """Samples of one backward on one process; sizes that do not divide the batch are refused."""
        micro = self.micro_batch_size or max(1, self.batch_size // num_processes)
        if self.batch_size % (micro * num_processes):
            fitting = [m for m in range(1, self.batch_size // num_processes + 1) if self.batch_size % (m * num_processes) == 0]
            sizes = ", ".join(map(str, fitting)) or "none; change batch_size or the number of processes"
            raise InputError(f"training.micro_batch_size: {micro} samples on {num_processes} process(es) do not divide "
                             f"batch_size {self.batch_size}; sizes that do: {sizes}.")
        return micro


class NotFinite(RuntimeError):
    """A term, or the gradient, is not finite: the run stops before the update."""


class Visit(Protocol):
    """What is done with the averaged weights every so many steps: a sample grid, an evaluation."""

    every: int

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> float | None:
        """The value by which the best checkpoint is chosen (smaller is better), or None. Collective."""
        ...


@dataclass
class Progress:
    """The trainer's own state: the number of finished updates, and the best checkpoint so far."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best_protocol: str | None = None  # that of best_value: one of another protocol is no rival


class Trainer:
    """Trains `denoiser` under `objective` in `folder`, from its latest checkpoint if it has one."""

    def __init__(
        self, accelerator: Accelerator, denoiser: nn.Module, objective: Objective, loader: Any, prepare: Preparation,
        optimizer: torch.optim.Optimizer, learning_rate: LearningRate, decay: Any | None, settings: Training, folder: Path, recipe: str,
        seed: int, visits: list[Visit],
    ):
        self.accelerator, self.settings, self.folder, self.recipe, self.seed = accelerator, settings, folder, recipe, seed
        self.loader, self.learning_rate, self.visits = loader, learning_rate, visits
        self.objective = objective.to(accelerator.device)
        self.prepare = prepare.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(denoiser, optimizer)
        # Once, not in every step: a LoRA makes thousands of modules, and a walk through them takes milliseconds.
        self.model.train()
        self.parameters = list(self.model.parameters())
        # Without accelerate's own autocast around the network: the objective runs under it as a whole, and a regularizer may leave it.
        self.bare = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.average = WeightAverage(self.bare, decay) if decay is not None else None
        self.num_micro = settings.batch_size // (settings.micro_batch_of(accelerator.num_processes) * accelerator.num_processes)
        self.window = runlog.Window(accelerator.device)
        self.progress = Progress()
        self.stop = StopRequest()
        self.seconds = {"training": 0.0, "visits": 0.0}
        self.logged = (0, 0.0)  # step and training seconds at the last line of the log
        others: dict[str, Any] = {"objective": self.objective, "window": self.window}
        if accelerator.scaler is not None:
            others["scaler"] = accelerator.scaler
        self.snapshot = checkpoint.Snapshot(self.bare, self.optimizer.optimizer, self.average, others)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self) -> int:
        """Continue from the latest whole checkpoint, if there is one; returns the number of finished steps."""
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            self.progress = Progress(**self.snapshot.load(newest))
        if self.accelerator.is_main_process:
            for name in ("log.jsonl", "evaluations.jsonl", "validation.jsonl", "skipped.jsonl"):
                runlog.cut_after(self.folder / name, self.progress.step)
        barrier()  # nothing is appended before it is cut
        return self.progress.step

    def run(self) -> bool:
        """Train to the last step; False if a signal stopped the run after saving."""
        self.logged = (self.progress.step, self.seconds["training"])
        with self.stop.listening(), contextlib.closing(self.loader.batches(self.progress.step)) as batches:
            bar = ProgressBar(self.settings.steps, self.progress.step, self.accelerator.is_main_process, "step")
            while self.progress.step < self.settings.steps and not self.stop.agreed:
                started = time.perf_counter()
                norm = self.step(batches)
                self.progress.step += 1
                self.seconds["training"] += time.perf_counter() - started
                if self._due(self.settings.log_every):
                    record = self._log(norm)
                    bar.show(self.progress.step, f"loss {record['loss']:.4f}  {record['wall']['images_per_second']:.0f} images/s")
                improved = self._visit()
                if self._due(self.settings.checkpoint_every) or improved or self.stop.agreed:
                    self.save()
            bar.close()
            return not bool(max_over_processes(torch.tensor(float(self.stop.requested))))  # also one that came in the last step

    def step(self, batches: Iterator[MicroBatch]) -> Tensor:
        """One update on one global batch; returns the gradient's norm before clipping."""
        step = self.progress.step
        self.optimizer.train()  # of schedule-free optimizers: the weights at which gradients are taken
        finite: dict[str, Tensor] = {}
        seen: list[Losses] = []
        before = {name: value.clone() for name, value in self.objective.state_dict().items()}
        with self.objective.context():
            for m in range(self.num_micro):
                batch, rng = self._batch(next(batches), step)
                last = m == self.num_micro - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model), self.accelerator.autocast():
                    losses = self.objective(self.model, batch, rng)
                self.accelerator.backward(losses.total / self.num_micro)
                seen.append(replace(losses, total=losses.total.detach()))
                for name, term in losses.terms.items():
                    finite[name] = torch.isfinite(term) & finite.get(name, True)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._refuse_what_is_not_finite(finite, norm, before)
        for losses in seen:
            self.window.add(losses)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.learning_rate(step, self.settings.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step, self.settings.batch_size)
        return norm

    def save(self) -> None:
        """Write a checkpoint of the state after the finished steps; older ones go afterwards."""
        self.optimizer.eval()  # of schedule-free optimizers: the averaged weights, which are the result
        state = {name: value for name, value in vars(self.progress).items() if name != "step"}
        self.snapshot.save(self.checkpoints, self.progress.step, state, self.recipe)
        if self.accelerator.is_main_process:
            protected = {self.progress.best_step} if self.progress.best_step is not None else set()
            checkpoint.rotate(self.checkpoints, self.settings.keep_checkpoints, protected)

    def _batch(self, micro: MicroBatch, step: int) -> tuple[Batch, Rng]:
        device = self.accelerator.device
        rng = Rng(self.seed, step, micro.samples, self.settings.batch_size)
        if micro.skipped:
            known = {record["name"] for record in runlog.records(self.folder / "skipped.jsonl")}  # each image once, not in every epoch
            for record in micro.skipped:
                if record["name"] not in known:
                    known.add(record["name"])
                    runlog.append(self.folder / "skipped.jsonl", {**record, "step": step + 1})
        wide = torch.promote_types(self.bare.dtype, torch.float32)
        return self.prepare(micro, rng, device, wide), rng

    def _refuse_what_is_not_finite(self, finite: dict[str, Tensor], norm: Tensor, before: dict[str, Tensor]) -> None:
        """One small reduction a step, which also agrees on a stop: no process may go on alone."""
        checks = {**finite, "gradient norm": torch.isfinite(norm) | torch.tensor(self.accelerator.scaler is not None, device=norm.device)}
        flags = torch.stack([~check.to(norm.device) for check in checks.values()] + [torch.tensor(self.stop.requested, device=norm.device)])
        *bad, stop = max_over_processes(flags.float()).tolist()
        self.stop.agreed = bool(stop)
        names = [name for name, flag in zip(checks, bad, strict=True) if flag]
        if names:
            self.optimizer.zero_grad()
            self.objective.load_state_dict(before)  # a running mean has met what is not finite
            self.save()
            raise NotFinite(
                f"step {self.progress.step + 1}: {' and '.join(names)} not finite; stopped before the update. The weights before it are in "
                f"{checkpoint.folder_of(self.checkpoints, self.progress.step)}. Lower optimizer.lr, add lr_schedule warm-up, or train in "
                "bf16 or float32, and go on with --accept-changes."
            )

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.settings.steps

    def _log(self, norm: Tensor) -> dict[str, Any]:
        """Append this window's means to the log. Collective."""
        terms, measures, bands = self.window.means()
        self.window.reset()
        step, seconds = self.progress.step, self.seconds["training"]
        since = step - self.logged[0], seconds - self.logged[1]
        self.logged = (step, seconds)
        record = {
            "step": step, "loss": terms.pop("loss"), "terms": terms, "measures": measures, "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": mean_over_processes(norm).item(), "images": step * self.settings.batch_size, "bands": bands,
            "wall": {"seconds": sum(self.seconds.values()), "images_per_second": since[0] * self.settings.batch_size / max(since[1], 1e-9)},
        }
        if self.accelerator.is_main_process:
            runlog.append(self.folder / "log.jsonl", record)
            flat = {key: record[key] for key in ("loss", "lr", "grad_norm")}
            named = {"terms": terms, "measures": measures}
            flat |= {f"{kind}/{name}": value for kind, values in named.items() for name, value in values.items()}
            self.accelerator.log(flat, step=step)
        return record

    def _visit(self) -> bool:
        """Let the visits that are due see the averaged weights; True if the evaluation found a new best."""
        due = [visit for visit in self.visits if self._due(visit.every)]
        if not due:
            return False
        started, improved = time.perf_counter(), False
        self.model.eval()
        self.optimizer.eval()
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            for visit in due:
                value = visit(self.bare, self.progress.step, self.seconds["training"])
                protocol = getattr(visit, "mark", None)
                best = self.progress.best_value if protocol == self.progress.best_protocol else None
                if value is not None and value < (math.inf if best is None else best):
                    self.progress.best_step, self.progress.best_value, improved = self.progress.step, value, True
                    self.progress.best_protocol = protocol
        self.model.train()
        self.seconds["visits"] += time.perf_counter() - started
        return improved


class StopRequest:
    """SIGTERM and SIGINT ask for a stop: the step is finished, a checkpoint saved. A later SIGINT interrupts at once."""

    SAME = 1.0  # seconds within which a second signal is the first one: a terminal and a launcher both send it

    def __init__(self) -> None:
        self.requested = self.agreed = False
        self.asked_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self.asked_at > self.SAME:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.asked_at = True, time.monotonic()
