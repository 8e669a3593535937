"""From samples to feature rows on the disk, shared out over the processes.

Samples are generated or read, extracted, and written at the same time. Blocks of consecutive
indices are fixed, so the same samples go through the extractor together on any number of
processes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.core.console import ProgressBar, wing_logger
from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.processes import (
    Alarm,
    barrier,
    is_main,
    max_over_processes,
    num_processes,
    on_main,
    share,
)
from difftrain.evaluation.agreement import summed, together
from difftrain.evaluation.evidence import FeatureSet
from difftrain.evaluation.requirements import check_sizes
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.sample_rows import CONTENT, IMAGE, LABEL, Nearest, SampleRows
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.store import RowStore

logger = wing_logger(__name__)

ROUNDS = 5  # in which rows are made again that somebody removes
ABSENT, DAMAGED = 1, 2  # what is the matter with a block


class Extraction:
    """The rows of one set of samples under one extractor, in a folder of their key.

    Collective: every process constructs and calls it.

    Args:
        source: The samples.
        extractor: What turns them into features.
        outputs: Which of its outputs are wanted; with none of them it is not asked.
        base: The folder that holds the folder of these rows, see `RowStore`.
        what: What messages call the set, such as "generated".
        nearest: Gives rows [b, 2] of distance and index, see `NearestTraining`.
        key: What else decides these rows, JSON-able.
        keeps_images: Whether the images are kept too, unless they are too many.
        reads_text: Whether the captions' rows are wanted, where there are captions.

    Raises:
        InputError: If the folder cannot be used, if the samples cannot be read, or if they need one
            size and differ.
    """

    def __init__(
        self,
        source: Source,
        extractor: FeatureExtractor,
        outputs: Sequence[str],
        base: Path,
        what: str,
        nearest: Nearest | None = None,
        key: dict[str, Any] | None = None,
        keeps_images: bool = False,
        reads_text: bool = False,
    ):
        check_sizes(source, extractor, in_pixels=nearest is not None)
        self.source, self.what = source, f"{what} {source.items_are}"
        wanted, text = sorted(outputs), reads_text and source.has_captions
        self.rows_of = together(
            lambda: SampleRows(source, extractor, wanted, self.what, nearest, keeps_images, text)
        )
        mark = {"source": source.identity(), **(key or {})}
        if wanted or text:
            mark["features"] = extractor.protocol()
        self.store = RowStore(
            base,
            self.what,
            mark,
            len(source),
            source.stored_together,
            self.rows_of.columns,
            source.total,
        )
        self.alarm = Alarm()
        self._rows: dict[str, Rows] | None = None
        self._pending: list[dict[str, Tensor]] = []  # rows of the first samples of a block

    def __call__(self) -> FeatureSet:
        """Extract what is missing, and return all rows of all processes.

        Raises:
            InputError: On every process, if any of them meets one; it ends the work of all.
            AgreedError: On every process, if one of several meets another exception.
        """
        for _ in range(ROUNDS):
            on_main(self.store.create)
            together(self.store.check_visible)
            missing = self._missing()
            if missing:
                self._extract(missing)
            # Another evaluation that is done with the same samples may remove their rows.
            self._rows = self._opened(missing)
            if self._rows is not None:
                break
        else:
            raise InputError(
                f"{self.store.folder}: blocks of {self.what} are removed again and again while "
                "they are made. Run one evaluation of these samples at a time."
            )
        rows = self._rows
        labels = rows[LABEL].whole()[:, 0] if LABEL in rows else None
        hidden = (LABEL, CONTENT, IMAGE)
        return FeatureSet(
            {name: column for name, column in rows.items() if name not in hidden},
            labels,
            marks=rows[CONTENT].whole()[:, 0],
        )

    def _missing(self) -> list[int]:
        """Return the blocks whose rows are not there or not whole, on every process."""
        blocks = range(self.store.num_blocks)

        def own() -> Tensor:
            marks = torch.zeros(len(blocks))
            for block in share(blocks):
                if not self.store.is_there(block):
                    marks[block] = ABSENT
                elif self.store.problem(block):
                    marks[block] = DAMAGED
            return marks

        marks = summed(own)
        damaged = int((marks == DAMAGED).sum())
        if damaged:
            logger.info(
                f"{self.what}: {damaged} of {len(blocks)} blocks in {self.store.folder} do not "
                "hold what was written; they are extracted again"
            )
        return [int(block) for block in marks.nonzero().flatten()]

    def _extract(self, missing: list[int]) -> None:
        """Deal the missing blocks out, and go through this process's own."""
        total = self.store.num_blocks
        done = total - len(missing)
        if done:
            logger.info(f"{self.what}: {done} of {total} blocks are there already")
        own = list(share(missing))
        rounds = -(-len(missing) // num_processes())
        together(lambda: self._work(own, rounds, done))

    def _opened(self, made: list[int]) -> dict[str, Rows] | None:
        """Open all rows.

        Args:
            made: Blocks that some process has just made; others were there before.

        Returns:
            The rows; None on every process if blocks have been removed meanwhile.

        Raises:
            InputError: On every process, if blocks that another process made do not appear here.
        """
        barrier()
        if made:
            together(self._check_visible)
        rows = together(self._rows_if_there)
        is_gone = max_over_processes(torch.tensor(float(rows is None)))
        return None if bool(is_gone) else rows

    def _rows_if_there(self) -> dict[str, Rows] | None:
        """Return all rows; None if somebody has just removed some of them."""
        try:
            return self.store.rows()
        except FileNotFoundError:
            return None

    def _check_visible(self) -> None:
        absent = self.store.absent()
        # Where the folder itself is gone, somebody has removed it.
        if absent and self.store.exists():
            raise InputError(
                f"{self.store.folder}: {len(absent)} blocks of {self.what}, which other processes "
                "wrote, are not here. An evaluation on several machines needs a folder that all of "
                "them share."
            )

    def content(self) -> dict[str, Any]:
        """Return what a protocol says of the set, once the rows are there.

        Returns:
            Its count, a digest of its samples and labels, and how files were opened.
        """
        assert self._rows is not None
        rows = self._rows
        labels = rows[LABEL].whole() if LABEL in rows else None
        values = digest(rows[CONTENT].whole(), labels)
        return {"count": self.store.num, "digest": values, **self.source.described()}

    def kept_images(self, indices: list[int]) -> Tensor | None:
        """Return images [n, C, H, W] uint8, if they were kept."""
        if IMAGE not in self.store.columns:
            return None
        assert self._rows is not None
        flat = self._rows[IMAGE].take(torch.tensor(indices))
        return flat.reshape(-1, *self.source.shape)

    def _work(self, own: list[int], rounds: int, done: int) -> None:
        """Go through this process's blocks.

        Args:
            own: The numbers of its blocks.
            rounds: The most blocks that any process has.
            done: Blocks that were there before.
        """
        progress = ProgressBar(self.store.num_blocks, done, is_main(), "block", self.what)
        try:
            self._go_through(own, rounds, progress, done)
        except Exception:
            self.alarm.ring()
            raise
        finally:
            progress.close()

    def _go_through(self, own: list[int], rounds: int, progress: ProgressBar, done: int) -> None:
        takes_part = self.source.every_process_takes_part
        works_ahead = self.source.works_ahead
        asked: list[int | None] = []
        wanted = self._wanted(own, rounds, asked)
        with ThreadPoolExecutor(1) if works_ahead else contextlib.nullcontext() as pool:
            looks: list[Future[None]] = []
            finished = 0
            for place, block in enumerate(self.source.blocks(wanted)):
                self._wait(looks[-1:])
                number = asked[place]
                before = asked[place - 1] if place else number
                finished += number != before
                shown = min(done + finished * num_processes(), self.store.num_blocks)
                progress.show(shown, at_end=False)
                if self.alarm.is_ringing() and not takes_part:
                    return  # the process that has the problem reports it
                if number is not None:
                    looks.append(started(pool, self._look, number, block))
                if pool is None:
                    self._wait(looks[-1:])
            for look in looks:
                look.result()

    def _wanted(self, own: list[int], rounds: int, asked: list[int | None]) -> Iterator[list[int]]:
        """Yield the indices of the samples that are asked for together.

        A block that somebody else has made meanwhile is passed over.

        Args:
            own: The blocks of this process.
            rounds: The most blocks that any process has.
            asked: Takes the number of the block that each list belongs to; None where the samples
                do not count.
        """
        takes_part, size = self.source.every_process_takes_part, self.source.block_size
        for block in own:
            if not takes_part and self.store.has(block):
                continue
            indices = self.store.indices(block)
            for start in range(0, len(indices), size):
                asked.append(block)
                yield indices[start : start + size]
        if takes_part:
            # Forwards that the other processes wait for
            for _ in range(rounds - len(own)):
                asked.append(None)
                yield self.store.indices(0)

    def _wait(self, looks: list[Future[None]]) -> None:
        """Wait for looks; an error ends the work, unless other processes wait for forwards."""
        wait(looks)
        if not self.source.every_process_takes_part:
            for look in looks:
                look.result()

    def _look(self, number: int, block: SampleBlock) -> None:
        """Extract samples, and write their block once all its samples are there."""
        indices = self.store.indices(number)
        start = sum(len(rows[CONTENT]) for rows in self._pending)
        own = indices[start : start + len(block.samples)]
        self._pending.append(self.rows_of(block, own))
        if start + len(own) < len(indices):
            return
        parts, self._pending = self._pending, []
        names = self.store.columns
        self.store.write(
            number, {name: torch.cat([rows[name] for rows in parts]) for name in names}
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
