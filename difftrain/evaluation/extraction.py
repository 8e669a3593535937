"""From samples to feature rows on the disk, shared out over the processes.

Samples are generated or read, extracted, and written at the same time. Blocks of consecutive
indices are fixed, so the same samples go through the extractor together on any number of
processes.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.core.console import ProgressBar, wing_logger
from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.processes import barrier, is_main, max_over_processes, num_processes, share
from difftrain.evaluation.agreement import together
from difftrain.evaluation.checks import broken_rows
from difftrain.evaluation.evidence import MAIN, NEAREST, TEXT, FeatureSet
from difftrain.evaluation.requirements import check_sizes
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.store import Column, RowStore

logger = wing_logger(__name__)

LABEL, CONTENT, IMAGE = "label", "content", "image"  # columns that metrics do not see
MOST_KEPT = 2**28  # bytes of images that are kept with their rows
SHOWN = 5  # samples that a message names

Nearest = Callable[[Tensor], Tensor]


class Extraction:
    """The rows of one set of samples under one extractor, in a folder.

    Collective: every process constructs and calls it.

    Args:
        source: The samples.
        extractor: What turns them into features.
        outputs: Which of its outputs are wanted.
        folder: Where the rows lie.
        what: What messages call the set, such as "generated".
        nearest: Gives rows [b, 2] of distance and index, see `NearestTraining`.
        key: What else identifies these rows, JSON-able.
        keeps_images: Whether the images are kept too, unless they are too many.

    Raises:
        InputError: If the folder cannot be used, or if the samples need one size and differ.
    """

    def __init__(
        self,
        source: Source,
        extractor: FeatureExtractor,
        outputs: Sequence[str],
        folder: Path,
        what: str,
        nearest: Nearest | None = None,
        key: dict[str, Any] | None = None,
        keeps_images: bool = False,
    ):
        check_sizes(source, extractor, in_pixels=nearest is not None)
        self.source, self.extractor, self.outputs = source, extractor, sorted(outputs)
        self.nearest = nearest
        self.what = f"{what} {source.items_are}"
        self.reads_text = "text" in extractor.gives and source.has_captions
        columns = together(lambda: self._columns(keeps_images))
        # The marks of sharded weights are collective themselves.
        is_sharded = source.every_process_takes_part
        identity = source.identity() if is_sharded else together(source.identity)
        mark = {"source": identity, "features": extractor.protocol(), **(key or {})}
        self.store = RowStore(folder, mark, len(source), source.block_size, columns)

    def __call__(self) -> FeatureSet:
        """Extract what is missing, and return all rows of all processes.

        Raises:
            InputError: On every process, if any of them meets one; it ends the work of all.
            AgreedError: On every process, if one of several meets another exception.
        """
        # Which blocks are missing
        barrier()
        missing = self.store.missing()
        barrier()  # nobody writes before everybody has read
        own = list(share(missing))
        rounds = int(max_over_processes(torch.tensor(float(len(own)))))
        total = self.store.num_blocks
        done = total - len(missing)
        if rounds and done:
            logger.info(f"{self.what}: {done} of {total} blocks are there already")
        # The work
        if rounds:
            together(lambda: self._work(own, rounds, done))
        barrier()
        together(self._check_complete)
        # The rows
        rows = self.store.rows()
        labels = rows[LABEL].whole()[:, 0] if LABEL in rows else None
        hidden = (LABEL, CONTENT, IMAGE)
        return FeatureSet(
            {name: column for name, column in rows.items() if name not in hidden}, labels
        )

    def content(self) -> dict[str, Any]:
        """Return what a protocol says of the set, once the rows are there.

        Returns:
            Its count, a digest of its samples and labels, and how files were opened.
        """
        rows = self.store.rows()
        labels = rows[LABEL].whole() if LABEL in rows else None
        values = digest(rows[CONTENT].whole(), labels)
        return {"count": self.store.num, "digest": values, **self.source.described()}

    def kept_images(self, indices: list[int]) -> Tensor | None:
        """Return images [n, C, H, W] uint8, if they were kept."""
        if IMAGE not in self.store.columns:
            return None
        flat = self.store.rows()[IMAGE].take(torch.tensor(indices))
        return flat.reshape(-1, *self.source.shape)

    def _columns(self, keeps_images: bool) -> dict[str, Column]:
        source, widths = self.source, self.extractor.widths
        columns = {name: Column(widths[name]) for name in self.outputs}
        columns[CONTENT] = Column(1, "int64")
        if source.has_labels:
            columns[LABEL] = Column(1, "int64")
        if self.nearest is not None:
            columns[NEAREST] = Column(2, "float64")
        if keeps_images and len(source) * math.prod(source.shape) <= MOST_KEPT:
            columns[IMAGE] = Column(math.prod(source.shape), "uint8")
        if self.reads_text:
            columns[TEXT] = Column(widths[MAIN])
        return columns

    def _check_complete(self) -> None:
        missing = len(self.store.missing())
        if missing:
            raise InputError(
                f"{self.store.folder}: {missing} blocks of {self.what}, which other processes "
                "wrote, are not here. An evaluation on several machines needs a folder that all of "
                "them share."
            )

    def _work(self, own: list[int], rounds: int, done: int) -> None:
        """Go through this process's blocks.

        Args:
            own: The numbers of its blocks.
            rounds: The most blocks that any process has.
            done: Blocks that were there before.
        """
        lists = [self.store.indices(block) for block in own]
        if self.source.every_process_takes_part:
            # Forwards that the other processes wait for
            lists += [self.store.indices(0)] * (rounds - len(own))
        progress = ProgressBar(self.store.num_blocks, done, is_main(), "block", self.what)
        try:
            self._go_through(lists, own, progress, done)
        except Exception:
            self.store.report_problem()
            raise
        finally:
            progress.close()

    def _go_through(
        self, lists: list[list[int]], own: list[int], progress: ProgressBar, done: int
    ) -> None:
        takes_part = self.source.every_process_takes_part
        works_ahead = self.source.works_ahead
        with ThreadPoolExecutor(1) if works_ahead else contextlib.nullcontext() as pool:
            looks: list[Future[None]] = []
            for number, block in enumerate(self.source.blocks(lists)):
                self._wait(looks[-1:])
                finished = min(done + number * num_processes(), self.store.num_blocks)
                progress.show(finished, at_end=False)
                if self.store.has_problem() and not takes_part:
                    return  # the process that has the problem reports it
                if number < len(own):
                    looks.append(started(pool, self._look, own[number], block))
                if pool is None:
                    self._wait(looks[-1:])
            for look in looks:
                look.result()

    def _wait(self, looks: list[Future[None]]) -> None:
        """Wait for looks; an error ends the work, unless other processes wait for forwards."""
        wait(looks)
        if not self.source.every_process_takes_part:
            for look in looks:
                look.result()

    def _look(self, number: int, block: SampleBlock) -> None:
        """Write down everything that is wanted of a block."""
        indices = self.store.indices(number)
        samples = block.samples.cpu()
        # Features
        rows = self.extractor.extract(block.samples, self.outputs)
        for name in self.outputs:
            self._check_finite(rows[name], indices, name)
        if self.reads_text:
            assert block.captions is not None
            rows[TEXT] = self.extractor.text(block.captions)
        # What else belongs to each sample
        if self.nearest is not None:
            rows[NEAREST] = self.nearest(samples)
        if self.source.has_labels:
            rows[LABEL] = self._labels(block, indices)
        content = [int(digest(sample), 16) - 2**63 for sample in samples]
        rows[CONTENT] = torch.tensor(content)[:, None]
        if IMAGE in self.store.columns:
            rows[IMAGE] = samples.flatten(1)
        self.store.write(number, rows)

    def _labels(self, block: SampleBlock, indices: list[int]) -> Tensor:
        if block.labels is None:
            raise InputError(
                f"{self.what}: some samples from {self.source.name_of(indices[0])} on have no "
                "label, but the first sample has one. Label all of them or none."
            )
        return block.labels.cpu().long()[:, None]

    def _check_finite(self, rows: Tensor, indices: list[int], output: str) -> None:
        broken = broken_rows(rows).tolist()
        if broken:
            named = ", ".join(self.source.name_of(indices[i]) for i in broken[:SHOWN])
            raise InputError(
                f"{self.what}: the {output} of {named} are not finite ({len(broken)} of a block of "
                f"{len(indices)}). A score of them would mean nothing. Look at these samples, and "
                "at the extractor."
            )


def started(
    pool: ThreadPoolExecutor | None, action: Callable[..., None], *arguments: Any
) -> Future[None]:
    """Start an action in a thread of a pool; without a pool, run it here and now."""
    if pool is not None:
        return pool.submit(action, *arguments)
    future: Future[None] = Future()
    try:
        action(*arguments)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future
