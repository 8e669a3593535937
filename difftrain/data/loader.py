"""The micro-batches of each step, as a function of (seed, step, process): no state to save, the same for any number of workers.

Sample k = step x batch_size + position is item `permuted(seed, k, N)` of a table, and its crop and flip are keyed by (seed, k), so
a table's samples are the same on any number of processes too. With buckets, the plan of the buckets says which items a step has. A
stream deals its rows out to processes instead.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from difftrain.batch import Cond
from difftrain.captions import Captions, described
from difftrain.data.buckets import BucketPlan
from difftrain.data.items import Clip, ImageDataset, ImageStream, Item, Sample, SampleSource, UnreadableImage, label_tensor, weight_of
from difftrain.data.transform import Size, Transform
from difftrain.registry import InputError
from difftrain.rng import Rng, permuted

SPARE_ITEMS = 100  # of a table that can stand for an unreadable one
SPARE_ROWS = 8  # rows of a stream at hand to replace an unreadable one


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one backward on one process.

    samples: their positions in the global batch of the step. pixels: [b, C, H, W], of clips [b, C, F, H, W], uint8; None where moments
    [b, 2C, h, w] come from a cache: mean and standard deviation of the latents' posterior. labels: [b] long. captions: as they are
    shown, "" where dropped; None without any, and where their states `cond` {name: [b, ...]} come from a cache. geometry: [b, 6] float32,
    see `Placed`; None of clips. weights: [b], what each counts in the loss. skipped: {"name", "reason", "step"} of each unreadable image
    that was met and replaced. names: of the images.
    """

    step: int
    samples: list[int]
    pixels: Tensor | None
    labels: Tensor | None
    captions: list[str] | None
    skipped: list[dict[str, Any]]
    moments: Tensor | None = None
    cond: Cond | None = None
    geometry: Tensor | None = None
    weights: Tensor | None = None
    names: list[str] | None = None


class Loader:
    """Micro-batches of a table or a stream.

    captions: how they are shown; None: as they are, if there are any. buckets: which sizes images are cropped to, and so which items a
    step has; None: one size, all items in one order. A cache brings its own transform, captions and sizes. num_workers: processes that
    read ahead; 0 reads in this one. on_error: an unreadable image stops the run with an InputError that names it, or is replaced by
    the next readable one: of the table, of its bucket, or of this process's stream.
    """

    def __init__(
        self,
        dataset: ImageDataset | ImageStream,
        transform: Transform,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        process_index: int,
        num_processes: int,
        captions: Captions | None = None,
        buckets: BucketPlan | None = None,
        num_workers: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
    ):
        assert batch_size % (micro_batch_size * num_processes) == 0, "micro_batch_size x num_processes must divide batch_size"
        assert buckets is None or (buckets.seed, buckets.batch_size) == (seed, batch_size), "the buckets were planned for another run"
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.process_index, self.num_processes = process_index, num_processes
        self.captions, self.buckets = captions, buckets
        self.num_workers, self.on_error = num_workers, on_error

    def batches(self, start_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of this process from `start_step` on, in order, without end."""
        assembler, tasks = Assembler(self._source(), self.seed, self.on_error), self._tasks(start_step)
        for batch in read_ahead(assembler, tasks, self.num_workers) if self.num_workers else map(assembler.__getitem__, tasks):
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def _source(self) -> SampleSource:
        if isinstance(self.dataset, SampleSource):
            return self.dataset
        return DecodedSamples(self.dataset, self.transform, self.captions)

    def _tasks(self, start_step: int) -> Iterator["Task"]:
        rows = self._streamed(self.dataset, start_step) if isinstance(self.dataset, ImageStream) else None
        per_step = self.batch_size // (self.micro_batch_size * self.num_processes)
        for step in count(start_step):
            size, candidates = self._candidates(step, rows)
            for m in range(per_step):
                first = (m * self.num_processes + self.process_index) * self.micro_batch_size
                samples = list(range(first, first + self.micro_batch_size))
                counters = [step * self.batch_size + position for position in samples]
                yield Task(step, samples, counters, [candidates(position) for position in samples], size)

    def _candidates(self, step: int, rows: Iterator[Sequence[Any]] | None) -> tuple[Size | None, Callable[[int], Sequence[Any]]]:
        """The size of a step's images, and what can stand for the sample at a position of its batch, the first choice first."""
        if rows is not None:
            return None, lambda position: next(rows)
        if self.buckets is None:
            items: Sequence[int] = range(len(self.dataset))  # type: ignore[arg-type]
            return None, lambda position: self._choice(items, permuted(self.seed, step * self.batch_size + position, len(items)))
        bucket, places = self.buckets.batch(step)
        return bucket.size, lambda position: self._choice(bucket.items, places(position))

    def _choice(self, items: Sequence[int] | np.ndarray, place: int) -> Sequence[int]:
        """The item at a place, and where unreadable ones are skipped those that follow it, the first one after the last."""
        count = min(len(items), 1 + SPARE_ITEMS) if self.on_error == "skip" else 1
        return [int(items[(place + i) % len(items)]) for i in range(count)]

    def _streamed(self, stream: ImageStream, start_step: int) -> Iterator[Sequence[Any]]:
        """For each sample of this process, its row and the following ones that can stand for it (used again in their own turn)."""
        consumed = start_step * self.batch_size // self.num_processes
        window: deque[Any] = deque(maxlen=1 + (SPARE_ROWS if self.on_error == "skip" else 0))
        for row in islice(stream.rows(self.seed, self.process_index, self.num_processes), consumed, None):
            window.append(row)
            if len(window) == window.maxlen:
                yield list(window)


@dataclass(frozen=True)
class Task:
    """A micro-batch to be read: for each sample its counter k, and what can be read for it, the first choice first."""

    step: int
    samples: list[int]
    counters: list[int]
    candidates: list[Sequence[Any]]
    size: Size | None = None


@dataclass(frozen=True)
class DecodedSamples:
    """Samples of a table or a stream: its items, transformed, with their captions as they are shown."""

    dataset: ImageDataset | ImageStream
    transform: Transform
    captions: Captions | None

    def sample(self, i: Any, rng: Rng, size: Size | None = None) -> Sample:
        item: Item | Clip = self.dataset.item(i) if isinstance(self.dataset, ImageStream) else self.dataset[i]
        placed = item.place(self.transform, rng, size)
        caption = item.caption if self.captions is None else self.captions(described(item.caption, item.name), rng)
        return Sample(item.label, caption, placed.pixels, placed.geometry, weight=weight_of(self.dataset, i), name=item.name)


class Assembler(Dataset["MicroBatch | InputError"]):
    """Task -> micro-batch. What a user can mend comes back as a value: an exception out of a worker would drag its traceback along."""

    def __init__(self, source: SampleSource, seed: int, on_error: str):
        self.source, self.seed, self.on_error = source, seed, on_error

    def __getitem__(self, task: Task) -> MicroBatch | InputError:
        skipped: list[dict[str, Any]] = []
        try:
            samples = [
                self._first_readable(candidates, Rng(self.seed, samples=[k]), task, skipped)
                for candidates, k in zip(task.candidates, task.counters, strict=True)
            ]
        except InputError as error:
            return error
        return assembled(task, samples, skipped)

    def _first_readable(self, candidates: Sequence[Any], rng: Rng, task: Task, skipped: list[dict[str, Any]]) -> Sample:
        failures: list[str] = []
        for candidate in candidates:
            try:
                return self.source.sample(candidate, rng, task.size)
            except UnreadableImage as error:
                failures.append(str(error))
                skipped.append({"name": error.name, "reason": error.reason, "step": task.step})
        if self.on_error == "stop":
            raise InputError(f"{failures[0]}. Repair or remove it, or write on_error: skip.")
        raise InputError(f"{len(failures)} images in a row cannot be read, so none can stand for another. The first: {failures[0]}.")


def assembled(task: Task, samples: Sequence[Sample], skipped: list[dict[str, Any]]) -> MicroBatch:
    captions = [sample.caption for sample in samples if sample.caption is not None]
    conds = [sample.cond for sample in samples if sample.cond is not None]
    weights = [sample.weight for sample in samples if sample.weight is not None]
    geometries = [sample.geometry for sample in samples if sample.geometry is not None]
    return MicroBatch(
        task.step, task.samples, stacked([sample.pixels for sample in samples]), label_tensor([sample.label for sample in samples]),
        captions or None, skipped, stacked([sample.moments for sample in samples]),
        {name: torch.stack([cond[name] for cond in conds]) for name in conds[0]} if conds else None,
        torch.tensor(geometries, dtype=torch.float32) if geometries else None, torch.tensor(weights) if weights else None,
        [sample.name for sample in samples],
    )


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """[b, ...], or None where there are none."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def read_ahead(assembler: Assembler, tasks: Iterator[Task], num_workers: int) -> Iterator[MicroBatch | InputError]:
    """Micro-batches in the order of the tasks, read by worker processes; the global generator is left alone."""
    return iter(
        DataLoader(
            assembler, batch_size=None, sampler=tasks, num_workers=num_workers,
            worker_init_fn=heed_main_process_alone, generator=torch.Generator(),
        )
    )  # fmt: skip


def heed_main_process_alone(worker: int) -> None:
    """In a worker: a signal to stop that the whole process group or job gets is for the main process, which still needs its workers
    to finish the step. Its own SIGTERM ends them, or one left over would keep it from exiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_when_told_by, args=(os.getppid(),), daemon=True).start()


def end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
