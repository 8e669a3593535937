"""The micro-batches of each step, as a function of (seed, step, process): no state to save, the same for any number of workers.

Sample k = step x batch_size + position is item `permuted(seed, k, N)` of a table, and its crop and flip are keyed by (seed, k), so
a table's samples are the same on any number of processes too. A stream deals its rows out to processes instead.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from difftrain.data.items import ImageDataset, ImageStream, Item, UnreadableImage, label_tensor
from difftrain.data.transform import Transform
from difftrain.registry import InputError
from difftrain.rng import Rng, permuted

SPARE_ROWS = 8  # rows of a stream at hand to replace an unreadable one


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one backward on one process.

    samples: their positions in the global batch of the step. pixels: [b, C, H, W], of clips [b, C, F, H, W], uint8. labels: [b] long.
    skipped: {"name", "reason", "step"} of each unreadable image that was met and replaced.
    """

    step: int
    samples: list[int]
    pixels: Tensor
    labels: Tensor | None
    captions: list[str] | None
    skipped: list[dict[str, Any]]


class Loader:
    """Micro-batches of a table or a stream.

    num_workers: processes that read ahead; 0 reads in this one. on_error: an unreadable image stops the run with an
    InputError that names it, or is replaced by the next readable one: of the table, or of this process's stream.
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
        num_workers: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
    ):
        assert batch_size % (micro_batch_size * num_processes) == 0, "micro_batch_size x num_processes must divide batch_size"
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.process_index, self.num_processes = process_index, num_processes
        self.num_workers, self.on_error = num_workers, on_error

    def batches(self, start_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of this process from `start_step` on, in order, without end."""
        assembler, tasks = Assembler(self._reader(), self.transform, self.seed, self.on_error), self._tasks(start_step)
        for batch in read_ahead(assembler, tasks, self.num_workers) if self.num_workers else map(assembler.__getitem__, tasks):
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def _reader(self) -> Callable[[Any], Item]:
        return self.dataset.item if isinstance(self.dataset, ImageStream) else partial(read_cyclic, self.dataset)

    def _tasks(self, start_step: int) -> Iterator["Task"]:
        rows = self._streamed(self.dataset, start_step) if isinstance(self.dataset, ImageStream) else None
        per_step = self.batch_size // (self.micro_batch_size * self.num_processes)
        for step in count(start_step):
            for m in range(per_step):
                first = (m * self.num_processes + self.process_index) * self.micro_batch_size
                samples = list(range(first, first + self.micro_batch_size))
                counters = [step * self.batch_size + position for position in samples]
                candidates = [self._permuted(k) for k in counters] if rows is None else list(islice(rows, len(samples)))
                yield Task(step, samples, counters, candidates)

    def _permuted(self, k: int) -> Sequence[int]:
        """Indices that can stand for sample k, the first choice first; read modulo the table's size."""
        size = len(self.dataset)  # type: ignore[arg-type]
        first = permuted(self.seed, k, size)
        return range(first, first + (size if self.on_error == "skip" else 1))

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


class Assembler(Dataset["MicroBatch | InputError"]):
    """Task -> micro-batch. What a user can mend comes back as a value: an exception out of a worker would drag its traceback along."""

    def __init__(self, read: Callable[[Any], Item], transform: Transform, seed: int, on_error: str):
        self.read, self.transform, self.seed, self.on_error = read, transform, seed, on_error

    def __getitem__(self, task: Task) -> MicroBatch | InputError:
        skipped: list[dict[str, Any]] = []
        try:
            items = [self._first_readable(candidates, task.step, skipped) for candidates in task.candidates]
            rngs = [Rng(self.seed, samples=[k]) for k in task.counters]
            pixels = [item.pixels(self.transform, rng) for item, rng in zip(items, rngs, strict=True)]
        except InputError as error:
            return error
        captions = [item.caption for item in items if item.caption is not None]
        labels = label_tensor([item.label for item in items])
        return MicroBatch(task.step, task.samples, torch.stack(pixels), labels, captions or None, skipped)

    def _first_readable(self, candidates: Sequence[Any], step: int, skipped: list[dict[str, Any]]) -> Item:
        failures: list[str] = []
        for candidate in candidates:
            try:
                return self.read(candidate)
            except UnreadableImage as error:
                failures.append(str(error))
                skipped.append({"name": error.name, "reason": error.reason, "step": step})
        if self.on_error == "stop":
            raise InputError(f"{failures[0]}. Repair or remove it, or write on_error: skip.")
        raise InputError(f"{len(failures)} images in a row cannot be read, so none can stand for another. The first: {failures[0]}.")


def read_cyclic(dataset: ImageDataset, index: int) -> Item:
    return dataset[index % len(dataset)]


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
