"""Buckets of one size each for images of several aspect ratios: which sizes there are, which images go where, and in what order.

Every step's global batch comes from one bucket. What it holds is a function of (seed, step), so that nothing is saved, any step can
follow, and the number of processes changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from difftrain.data.items import ImageDataset, ImageStream, UnreadableImage, frames_of
from difftrain.data.originals import original
from difftrain.data.transform import Size, Transform, covering_size
from difftrain.distributed import num_processes, on_all, process_index, sum_over_processes
from difftrain.registry import InputError, PositiveInt, bounded, check_arguments
from difftrain.rng import key, permuted

READERS = 8  # threads that read headers: a disk across a network answers several at once


@dataclass(frozen=True)
class Buckets:
    """Sizes of about resolution x resolution pixels, whose sides are multiples of `step`.

    For each width the largest height with height x width <= resolution^2, the same with both exchanged, and the largest square; of these
    the ones with longer side <= max_ratio x shorter side, and with sides from min_side to max_side. An image goes to the size whose
    aspect ratio is the nearest in logarithm, is resized to cover it, and is cropped.
    """

    step: PositiveInt = 64
    max_ratio: bounded(1.0) = 2.0  # type: ignore[valid-type]
    min_side: PositiveInt | None = None
    max_side: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_arguments(Buckets, vars(self), "buckets", directly=True)

    def sizes(self, resolution: int) -> list[Size]:
        """(height, width) of the buckets, in the order of their aspect ratios."""
        area, square = resolution**2, resolution // self.step * self.step
        pairs = [(side, area // side // self.step * self.step) for side in range(self.step, area // self.step + 1, self.step)]
        allowed = [(side, other) for side, other in [*pairs, (square, square)] if other and self._allows(side, other)]
        found = {size for side, other in allowed for size in ((side, other), (other, side))}
        if not found:
            raise InputError(f"buckets: no size of at most {resolution}x{resolution} pixels has sides that are multiples of {self.step} "
                             f"within {self._limits()}. Write a smaller step, or wider limits.")
        return sorted(found, key=lambda size: (size[1] / size[0], size[1]))

    def plan(self, dataset: ImageDataset | ImageStream, transform: Transform, seed: int, batch_size: int) -> "BucketPlan":
        """Which images go where. Collective: each process reads the headers of its share."""
        if isinstance(dataset, ImageStream) or frames_of(dataset) is not None:
            raise InputError("buckets: sizes are read before training, from a table of images; these are "
                             f"{'a stream' if isinstance(dataset, ImageStream) else 'clips'}. Leave buckets out.")
        if transform.resize == "none":
            raise InputError("buckets: images are resized to cover their bucket, but transform.resize is none. Write resize: bicubic.")
        sides = read_sizes(dataset, transform.resolution)
        sizes = self.sizes(transform.resolution)
        chosen = assign(sides, sizes)
        filled = [Bucket(size, np.flatnonzero(chosen == b), sides[chosen == b]) for b, size in enumerate(sizes) if (chosen == b).any()]
        return BucketPlan(filled, seed, batch_size)

    def _allows(self, height: int, width: int) -> bool:
        shorter, longer = sorted((height, width))
        return longer <= self.max_ratio * shorter and shorter >= (self.min_side or 1) and longer <= (self.max_side or longer)

    def _limits(self) -> str:
        sides = f", min_side {self.min_side}" * bool(self.min_side) + f", max_side {self.max_side}" * bool(self.max_side)
        return f"max_ratio {self.max_ratio}{sides}"


@dataclass(frozen=True, eq=False)
class Bucket:
    """One size, the items [n] that it holds, and their own sizes [n, 2]."""

    size: Size
    items: np.ndarray
    sides: np.ndarray

    @cached_property
    def num_enlarged(self) -> int:
        """Images that are smaller than the size that covers the bucket."""
        return sum(covering_size((h, w), self.size)[0] > h for h, w in self.sides.tolist())

    @property
    def mean_crop(self) -> float:
        """The share of an image's area that is cropped away, on average."""
        covered = np.array([math.prod(covering_size((h, w), self.size)) for h, w in self.sides.tolist()])
        return float(1 - (math.prod(self.size) / covered).mean())


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """The items of each bucket and the order in which they are visited.

    A bucket of N items is an endless stream of keyed permutations of them, cut into batches of B. Epoch e has its batches
    floor(e N / B) up to floor((e + 1) N / B): of all buckets together, in a keyed order. Nothing is dropped: what does not fill a batch
    in one epoch fills it in a later one.
    """

    buckets: list[Bucket]
    seed: int
    batch_size: int

    def batch(self, step: int) -> tuple[Bucket, Callable[[int], int]]:
        """The bucket of a step, and which of its items (by place) the sample at a position of the batch is."""
        b, number = self._place(step)
        bucket = self.buckets[b]
        stream = key(self.seed, *bucket.size, "order in a bucket")
        return bucket, lambda position: permuted(stream, number * self.batch_size + position, len(bucket.items))

    def size_of(self, i: int) -> Size:
        """(height, width) to which item i is cropped."""
        return self.buckets[int(self._bucket_of[i])].size

    def table(self) -> str:
        """What goes where, for people."""
        rows, enlarged = [("height x width", "images", "enlarged", "cropped away", "batches an epoch")], 0
        for bucket in self.buckets:
            count, (height, width) = len(bucket.items), bucket.size
            crop, batches = f"{100 * bucket.mean_crop:.1f} %", f"{count / self.batch_size:.2f}"
            rows.append((f"{height} x {width}", str(count), str(bucket.num_enlarged), crop, batches))
            enlarged += bucket.num_enlarged
        total = sum(self.counts)
        rows.append(("all", str(total), str(enlarged), "", f"{total / self.batch_size:.2f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    @property
    def counts(self) -> list[int]:
        """Items of each bucket."""
        return [len(bucket.items) for bucket in self.buckets]

    @cached_property
    def _bucket_of(self) -> np.ndarray:
        found = np.empty(sum(self.counts), dtype=np.int32)
        for b, bucket in enumerate(self.buckets):
            found[bucket.items] = b
        return found

    def _begun(self, epoch: int) -> list[int]:
        """How many batches each bucket has given before an epoch."""
        return [epoch * count // self.batch_size for count in self.counts]

    def _place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of its batch."""
        epoch = self._epoch(step)
        before = self._begun(epoch)
        ends = np.cumsum([0] + [after - begun for begun, after in zip(before, self._begun(epoch + 1), strict=True)])
        generator = torch.Generator().manual_seed(key(self.seed, epoch, int(ends[-1]), "order of buckets"))
        drawn = torch.randperm(int(ends[-1]), generator=generator)[: step - sum(before) + 1].numpy()
        b = int(np.searchsorted(ends, drawn[-1], side="right")) - 1
        earlier = int(((ends[b] <= drawn[:-1]) & (drawn[:-1] < ends[b + 1])).sum())  # batches of this bucket in this epoch
        return b, before[b] + earlier

    def _epoch(self, step: int) -> int:
        """The last epoch that begins at this step or before."""
        low, high = 0, 1
        while sum(self._begun(high)) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._begun(middle)) <= step else (low, middle)
        return low


def assign(sides: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """For images of sides [n, 2] (height, width) the place [n] of the size whose aspect ratio is nearest in logarithm; of equal ones the
    larger size."""
    order = sorted(range(len(sizes)), key=lambda b: -math.prod(sizes[b]))
    ratios = np.log([sizes[b][1] / sizes[b][0] for b in order])
    own = np.log(sides[:, 1] / sides[:, 0])
    return np.array(order)[np.abs(own[:, None] - ratios).argmin(axis=1)]


def read_sizes(dataset: ImageDataset, resolution: int) -> np.ndarray:
    """(height, width) [N, 2] of all images, from their headers. An unreadable one counts as a square: what becomes of it is decided where
    it is read. Collective."""
    mine = range(process_index(), len(dataset), num_processes())
    sides = torch.zeros(len(dataset), 2, dtype=torch.int64)

    def read() -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for i, size in zip(mine, pool.map(partial(size_of, dataset, resolution), mine, chunksize=64), strict=True):
                sides[i] = torch.tensor(size)

    on_all(read)
    return sum_over_processes(sides).numpy()


def size_of(dataset: Any, resolution: int, i: int) -> Size:
    try:
        return dataset.size(i) if hasattr(dataset, "size") else original(dataset, i).size()
    except UnreadableImage:
        return resolution, resolution
