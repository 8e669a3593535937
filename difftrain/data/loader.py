"""The micro-batches of each step, as a function of (seed, step, process), so that nothing is saved.

Sample k = step x batch_size + position is item `permuted(seed, k, N)` of a map-style data set, and
its crop and flip are functions of (seed, k), so the samples are the same on any number of processes
and workers. With buckets, the plan of the buckets says which items a step has. The rows of a stream
are shared out to the processes instead.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng, permuted
from difftrain.data.batch import MicroBatch, Sample, SampleSource
from difftrain.data.buckets import BucketPlan
from difftrain.data.captions import Captions
from difftrain.data.items import Dataset, MapDataset, StreamDataset, label_tensor
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Size, Transform
from difftrain.data.unreadable import TRAINING, OnError, ReadErrors, entry
from difftrain.objective.types import Cond

SPARE_ITEMS = 100  # of a map-style data set, which can replace an unreadable one
SPARE_ROWS = 8  # of a stream, which are at hand to replace an unreadable one

Choices = Sequence[Any]  # what can be read for one sample, the first choice first


class Loader:
    """Micro-batches of a data set.

    Args:
        dataset: The data set. A cache brings its own transform, captions and sizes.
        transform: Turns images into pixels; None for a data set of tensors.
        seed: The seed of order, crops, flips and captions.
        batch_size: Samples of a step on all processes.
        micro_batch_size: Samples of a micro-batch; times num_processes it divides batch_size.
        process_index: The rank.
        num_processes: The world size.
        captions: How captions are shown; None: as they are, if there are any.
        buckets: The sizes that images are cropped to, and the items of each step; None: one size,
            and all items in one order.
        num_workers: Processes that read ahead; 0 reads in this process.
        on_error: Whether an unreadable image stops the run with an InputError that names it, or is
            replaced by the next readable one of the data set, of its bucket, or of this process's
            stream.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform | None,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        process_index: int,
        num_processes: int,
        captions: Captions | None = None,
        buckets: BucketPlan | None = None,
        num_workers: int = 0,
        on_error: OnError = "stop",
    ):
        assert batch_size % (micro_batch_size * num_processes) == 0, (
            "micro_batch_size x num_processes must divide batch_size"
        )
        assert buckets is None or (buckets.seed, buckets.batch_size) == (seed, batch_size), (
            "the buckets were planned for another run"
        )
        assert (transform is None) == (dataset.items_are == "tensors"), (
            "images and clips need a transform, and tensors take none"
        )
        for error in dataset.not_opened():
            ReadErrors(on_error).met(error, TRAINING)
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.captions = captions
        self.buckets = buckets
        self.num_workers = num_workers
        self.on_error = on_error

    def batches(self, start_step: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches from a step on, in order, without end.

        Args:
            start_step: The first step.

        Raises:
            InputError: If an image is unreadable (see `on_error`), or an item is wrong.
        """
        # No local variable holds the iterator: an exception keeps this frame, and would keep the
        # workers alive with it.
        for batch in self._read(start_step):
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def _read(self, start_step: int) -> Iterator[MicroBatch | InputError]:
        source = self.dataset.sample_source(self.transform, self.captions)
        assembler = Assembler(source, self.seed, self.on_error)
        tasks = self._tasks(start_step)
        if self.num_workers:
            return read_ahead(assembler, tasks, self.num_workers)
        return map(assembler.__getitem__, tasks)

    def _tasks(self, start_step: int) -> Iterator["Task"]:
        """Yield what is to be read for each micro-batch."""
        choices_of = self._choices_by_step(start_step)
        per_step = self.batch_size // (self.micro_batch_size * self.num_processes)
        for step in count(start_step):
            size, choices_at = choices_of(step)
            for m in range(per_step):
                first = (m * self.num_processes + self.process_index) * self.micro_batch_size
                samples = list(range(first, first + self.micro_batch_size))
                counters = [step * self.batch_size + position for position in samples]
                candidates = [choices_at(position) for position in samples]
                yield Task(step, samples, counters, candidates, size)

    def _choices_by_step(self, start_step: int) -> Callable[[int], "StepChoices"]:
        """Return what gives the choices of a step, which is called for each step in order."""
        if isinstance(self.dataset, StreamDataset):
            rows = self._streamed(self.dataset, start_step)
            in_stream = StepChoices(None, lambda position: next(rows))
            return lambda step: in_stream
        if self.buckets is not None:
            return self._choices_in_bucket
        return self._choices_among_all

    def _choices_among_all(self, step: int) -> "StepChoices":
        assert isinstance(self.dataset, MapDataset)
        items = range(len(self.dataset))
        start = step * self.batch_size

        def choices_at(position: int) -> Choices:
            return self._from(items, permuted(self.seed, start + position, len(items)))

        return StepChoices(None, choices_at)

    def _choices_in_bucket(self, step: int) -> "StepChoices":
        assert self.buckets is not None
        bucket, places = self.buckets.batch(step)
        return StepChoices(bucket.size, lambda position: self._from(bucket.items, places(position)))

    def _from(self, items: Sequence[int] | np.ndarray, place: int) -> Choices:
        """Return the item at a place, and with on_error "skip" the following ones, cyclically."""
        num = min(len(items), 1 + SPARE_ITEMS) if self.on_error == "skip" else 1
        return [int(items[(place + i) % len(items)]) for i in range(num)]

    def _streamed(self, stream: StreamDataset, start_step: int) -> Iterator[Choices]:
        """Yield for each sample of this process its row, and the rows that can replace it.

        A row that replaces another one is used again when it is its own turn.
        """
        consumed = start_step * self.batch_size // self.num_processes
        rows = stream.rows(self.seed, self.process_index, self.num_processes)
        window: deque[Any] = deque(maxlen=1 + (SPARE_ROWS if self.on_error == "skip" else 0))
        for row in islice(rows, consumed, None):
            window.append(row)
            if len(window) == window.maxlen:
                yield list(window)


class StepChoices(NamedTuple):
    """What can be read in one step.

    Attributes:
        size: (height, width) of its bucket; None without buckets.
        at: The choices for a position in the global batch.
    """

    size: Size | None
    at: Callable[[int], Choices]


@dataclass(frozen=True)
class Task:
    """What is to be read for one micro-batch.

    Args:
        step: Its optimizer step.
        samples: The positions of its samples in the step's global batch.
        counters: The counter k of each sample, which is the key of its random numbers.
        candidates: What can be read for each sample, the first choice first.
        size: (height, width) of its bucket; None without buckets.
    """

    step: int
    samples: list[int]
    counters: list[int]
    candidates: list[Choices]
    size: Size | None = None


class Assembler(torch.utils.data.Dataset["MicroBatch | InputError"]):
    """Reads the micro-batch of a task.

    An InputError is returned as a value: if it were raised in a worker, its message would hold a
    traceback.

    Args:
        source: Makes the samples.
        seed: The seed of their random numbers.
        on_error: See `Loader`.
    """

    def __init__(self, source: SampleSource, seed: int, on_error: OnError):
        self.source = source
        self.seed = seed
        self.errors = ReadErrors(on_error)

    def __getitem__(self, task: Task) -> MicroBatch | InputError:
        skipped: list[dict[str, Any]] = []
        try:
            samples = []
            for candidates, k in zip(task.candidates, task.counters, strict=True):
                rng = Rng(self.seed, samples=[k])
                samples.append(self._first_readable(candidates, rng, task, skipped))
            return assembled(task, samples, skipped)
        except InputError as error:
            return error

    def _first_readable(
        self, candidates: Choices, rng: Rng, task: Task, skipped: list[dict[str, Any]]
    ) -> Sample:
        failures: list[str] = []
        for candidate in candidates:
            try:
                return self.source.sample(candidate, rng, task.size)
            except UnreadableImage as error:
                failures.append(str(error))
                # Steps count from 1 for people.
                skipped.append(entry(TRAINING, error, task.step + 1))
        if self.errors.on_error == "stop":
            raise InputError(self.errors.refusal(failures[0]))
        raise InputError(
            f"{len(failures)} images in a row cannot be read, so none can replace another one. The "
            f"first: {failures[0]}. Repair or remove them."
        )


def assembled(task: Task, samples: Sequence[Sample], skipped: list[dict[str, Any]]) -> MicroBatch:
    """Stack the samples of a micro-batch.

    Args:
        task: The task that they were read for.
        samples: The b samples.
        skipped: See `MicroBatch`.

    Raises:
        InputError: If the conditioning tensors of the samples differ in names or shapes.
    """
    captions = [sample.caption for sample in samples if sample.caption is not None]
    geometries = [sample.geometry for sample in samples if sample.geometry is not None]
    return MicroBatch(
        task.step,
        task.samples,
        stacked([sample.pixels for sample in samples]),
        label_tensor([sample.label for sample in samples]),
        captions or None,
        skipped,
        stacked([sample.moments for sample in samples]),
        stacked_cond(samples),
        torch.tensor(geometries, dtype=torch.float32) if geometries else None,
        stacked_weights(samples),
        [sample.name for sample in samples],
        stacked([sample.values for sample in samples]),
    )


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors as [b, ...], or None where there are none."""
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(known) if known else None


def stacked_cond(samples: Sequence[Sample]) -> Cond | None:
    """Return the samples' conditioning tensors {name: [b, ...]}, or None where there are none.

    Raises:
        InputError: If they differ in names or shapes.
    """
    conds = [sample.cond or {} for sample in samples]
    shapes = [{name: tuple(value.shape) for name, value in cond.items()} for cond in conds]
    for sample, found in zip(samples, shapes, strict=True):
        if found != shapes[0]:
            raise InputError(
                f"data: {sample.name or 'an item'} has the conditioning tensors {found}, but "
                f"{samples[0].name or 'another one'} has {shapes[0]}. All items need the same "
                "names and shapes."
            )
    names = list(conds[0])
    return {name: torch.stack([cond[name] for cond in conds]) for name in names} or None


def stacked_weights(samples: Sequence[Sample]) -> Tensor | None:
    """Return what the samples count in the loss, [b]; None where all count the same."""
    weights = [sample.weight for sample in samples]
    if all(weight is None for weight in weights):
        return None
    return torch.tensor([1.0 if weight is None else weight for weight in weights])


def read_ahead(
    assembler: Assembler, tasks: Iterator[Task], num_workers: int
) -> Iterator[MicroBatch | InputError]:
    """Yield micro-batches that worker processes read, in the order of the tasks.

    The global random generator is left alone.

    Args:
        assembler: Reads a micro-batch.
        tasks: What is to be read.
        num_workers: How many processes.
    """
    loader = torch.utils.data.DataLoader(
        assembler,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        worker_init_fn=obey_main_process_only,
        generator=torch.Generator(),
    )
    return iter(loader)


def obey_main_process_only(worker: int) -> None:
    """Make a worker ignore signals to stop that do not come from its main process.

    A signal to the whole process group or job is for the main process, which still needs its
    workers to finish the step. SIGTERM from the main process ends the worker, so that none is left
    over.

    Args:
        worker: The worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # others may lack sigwaitinfo
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_with_signal_of, args=(os.getppid(),), daemon=True).start()


def end_with_signal_of(process: int) -> None:
    """Wait for SIGTERM from a process, and end this one."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
