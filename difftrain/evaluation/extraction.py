"""From images to feature rows on the disk, dealt over processes: made or read, looked at and written down at the same time.

Blocks of consecutive indices are fixed, so the same images go through the extractor together on any number of processes.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.distributed import barrier, is_main, max_over_processes, num_processes, on_all, share
from difftrain.evaluation.evidence import NEAREST, TEXT, FeatureSet
from difftrain.evaluation.extractor import FEATURES, FeatureExtractor, ReadsText
from difftrain.evaluation.rows import whole
from difftrain.evaluation.sources import Block, ImageSource
from difftrain.evaluation.store import Column, RowStore
from difftrain.progress import ProgressBar
from difftrain.registry import InputError
from difftrain.storage import digest

LABEL, CONTENT, IMAGE = "label", "content", "image"
MOST_KEPT = 2**28  # bytes of images that are kept beside their rows

Nearest = Callable[[Tensor], Tensor]


class Extraction:
    """The rows of one set of images under one extractor, in a folder. Collective: made and called on all processes.

    outputs: those of the extractor that are wanted. nearest: gives [distance, index] rows, see `memorization`. what: the set's name in
    messages. keeps_images: the images themselves too, unless they are too many.
    """

    def __init__(
        self, source: ImageSource, extractor: FeatureExtractor, outputs: Sequence[str], folder: Path, what: str,
        nearest: Nearest | None = None, key: dict[str, Any] | None = None, keeps_images: bool = False,
    ):
        self.source, self.extractor, self.outputs, self.what, self.nearest = source, extractor, sorted(outputs), what, nearest
        self.image_shape = source.shape
        self.reads_text = isinstance(extractor, ReadsText) and source.has_captions
        columns = on_all(lambda: self._columns(keeps_images))
        full_key = {"source": source.identity(), "features": extractor.protocol(), **(key or {})}
        self.store = on_all(lambda: RowStore(folder, full_key, len(source), source.block_size, columns))

    def _columns(self, keeps_images: bool) -> dict[str, Column]:
        source, widths = self.source, self.extractor.widths
        columns = {name: Column(widths[name]) for name in self.outputs} | {CONTENT: Column(1, "int64")}
        columns |= {LABEL: Column(1, "int64")} if source.has_labels else {}
        columns |= {NEAREST: Column(2, "float64")} if self.nearest is not None else {}
        keeps_images = keeps_images and len(source) * math.prod(source.shape) <= MOST_KEPT
        columns |= {IMAGE: Column(math.prod(source.shape), "uint8")} if keeps_images else {}
        return columns | ({TEXT: Column(widths[FEATURES])} if self.reads_text else {})

    def __call__(self) -> FeatureSet:
        """All rows, from all processes. An InputError that any process meets is raised on all, and ends their work."""
        barrier()
        missing = self.store.missing()
        barrier()  # nobody writes before everybody has read
        own = list(share(missing))
        rounds = int(max_over_processes(torch.tensor(float(len(own)))))
        done, total = self.store.num_blocks - len(missing), self.store.num_blocks
        if rounds and done and is_main():
            print(f"{self.what} images: {done} of {total} blocks are there already", flush=True)
        if rounds:
            on_all(lambda: self._work(own, rounds, done))
        barrier()
        if self.store.missing():
            raise InputError(f"{self.store.folder}: {len(self.store.missing())} blocks of {self.what} images, which other processes wrote, "
                             "are not here. An evaluation on several machines needs a folder that all of them share.")
        rows = self.store.rows()
        labels = whole(rows[LABEL])[:, 0] if LABEL in rows else None
        return FeatureSet({name: part for name, part in rows.items() if name not in (LABEL, CONTENT, IMAGE)}, labels)

    def content(self) -> dict[str, Any]:
        """What the protocol says of the set: its count, and a digest of its pixels and labels. After the rows are there."""
        rows = self.store.rows()
        return {"count": self.store.num, "digest": digest(whole(rows[CONTENT]), whole(rows[LABEL]) if LABEL in rows else None)}

    def kept_images(self, indices: list[int]) -> Tensor | None:
        """Images [n, C, H, W] uint8, if they were kept."""
        if IMAGE not in self.store.columns:
            return None
        return self.store.rows()[IMAGE].take(torch.tensor(indices)).unflatten(1, self.image_shape)

    def _work(self, own: list[int], rounds: int, done: int) -> None:
        lists = [self.store.indices(block) for block in own]
        spare = rounds - len(own) if self.source.every_process_takes_part else 0
        lists += [self.store.indices(0)] * spare  # forwards that the others wait for
        progress = ProgressBar(self.store.num_blocks, done, is_main(), "block", self.what)
        try:
            with ThreadPoolExecutor(1) if self.source.makes_meanwhile else contextlib.nullcontext() as pool:
                pending: Future[None] | None = None
                for number, made in enumerate(self.source.blocks(lists)):
                    if pending is not None:
                        pending.result()
                    progress.show(min(done + number * num_processes(), self.store.num_blocks), at_end=False)
                    if self.store.has_problem() and not self.source.every_process_takes_part:
                        return  # the process that has met it tells what it is
                    if number < len(own) and pool is not None:
                        pending = pool.submit(self._look, own[number], made)
                    elif number < len(own):
                        self._look(own[number], made)
                if pending is not None:
                    pending.result()
        except Exception:
            self.store.tell_problem()
            raise
        finally:
            progress.close()

    def _look(self, number: int, made: Block) -> None:
        indices = self.store.indices(number)
        rows = self.extractor.extract(made.images, self.outputs)
        for name in self.outputs:
            self._refuse_broken(rows[name], indices, name)
        if self.reads_text:
            assert isinstance(self.extractor, ReadsText)
            assert made.captions is not None
            rows[TEXT] = self.extractor.text(made.captions)
        if self.nearest is not None:
            rows[NEAREST] = self.nearest(made.images.cpu())
        if self.source.has_labels:
            if made.labels is None:
                raise InputError(f"{self.what} images: some of those from {self.source.name_of(indices[0])} on have no label, and others "
                                 "have. Label all of them or none.")
            rows[LABEL] = made.labels.cpu().long()[:, None]
        rows[CONTENT] = torch.tensor([[int(digest(image), 16) - 2**63] for image in made.images.cpu()])
        if IMAGE in self.store.columns:
            rows[IMAGE] = made.images.cpu().flatten(1)
        self.store.write(number, rows)

    def _refuse_broken(self, rows: Tensor, indices: list[int], output: str) -> None:
        broken = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
        if broken:
            named = ", ".join(self.source.name_of(indices[i]) for i in broken[:5])
            raise InputError(f"{self.what} images: the {output} of {named} are not finite ({len(broken)} of a block of {len(indices)}). No "
                             "score of them means anything; look at the images, and at the extractor.")
