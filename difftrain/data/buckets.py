"""Buckets for images of several aspect ratios: their sizes, and the images of each step.

Every step's global batch comes from one bucket, whose images are cropped to one size. What it holds
is a function of (seed, step), so that nothing is saved, a run starts at any step, and the number of
processes changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from difftrain.core.errors import InputError
from difftrain.core.processes import num_processes, on_all, process_index, sum_over_processes
from difftrain.core.registry import PositiveInt, bounded, check_arguments
from difftrain.core.rng import key, permuted
from difftrain.data.items import Dataset, MapDataset
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Size, Transform, covering_size

READERS = 8  # threads that read headers: a disk across a network answers several at once


@dataclass(frozen=True)
class Buckets:
    """Sizes of about resolution x resolution pixels, whose sides are multiples of `step`.

    For each width there is the largest height with height x width <= resolution^2, the same with
    height and width exchanged, and the largest square. An image goes to the size whose aspect ratio
    is nearest in logarithm, is resized to cover it, and is cropped.

    Args:
        step: Sides are multiples of this many pixels.
        max_ratio: The longer side is at most this many times the shorter one.
        min_side: The shortest side, in pixels; None: any.
        max_side: The longest side, in pixels; None: any.
    """

    step: PositiveInt = 64
    max_ratio: bounded(1.0) = 2.0  # type: ignore[valid-type]
    min_side: PositiveInt | None = None
    max_side: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_arguments(Buckets, vars(self), "buckets", directly=True)

    def sizes(self, resolution: int) -> list[Size]:
        """Return (height, width) of the buckets, in the order of their aspect ratios.

        Args:
            resolution: Side of the square with the most pixels that a bucket may have.

        Raises:
            InputError: If the limits leave no size.
        """
        area = resolution**2
        square = resolution // self.step * self.step
        pairs = [(square, square)]
        for side in range(self.step, area // self.step + 1, self.step):
            pairs.append((side, area // side // self.step * self.step))
        allowed = [(side, other) for side, other in pairs if self._allows(side, other)]
        found = {*allowed, *((other, side) for side, other in allowed)}
        if not found:
            raise InputError(
                f"buckets: no size of at most {resolution}x{resolution} pixels has sides that are "
                f"multiples of {self.step} within {self._limits()}. Write a smaller step, or wider "
                "limits."
            )
        return sorted(found, key=lambda size: (size[1] / size[0], size[1]))

    def plan(
        self, dataset: Dataset, transform: Transform | None, seed: int, batch_size: int
    ) -> "BucketPlan":
        """Assign the images to buckets. Collective: each process reads the headers of its share.

        Args:
            dataset: The images.
            transform: Turns them into pixels.
            seed: The seed of the order.
            batch_size: Samples of a step on all processes.

        Raises:
            InputError: If the items are not images by index, or are not resized.
        """
        if not isinstance(dataset, MapDataset) or dataset.items_are != "images":
            raise InputError(
                "buckets: image sizes are read before training, which needs a map-style data set "
                f"of images; these are {'a stream' if dataset.is_stream else dataset.items_are}. "
                "Leave buckets out."
            )
        assert transform is not None, "images need a transform"
        if transform.resize == "none":
            raise InputError(
                "buckets: images are resized to cover their bucket, but transform.resize is none. "
                "Write resize: bicubic."
            )
        sides = read_sizes(dataset, transform.resolution)
        sizes = self.sizes(transform.resolution)
        chosen = assign(sides, sizes)
        buckets = []
        for b, size in enumerate(sizes):
            items = np.flatnonzero(chosen == b)
            if len(items):
                buckets.append(Bucket(size, items, sides[items]))
        return BucketPlan(buckets, seed, batch_size)

    def _allows(self, height: int, width: int) -> bool:
        shorter, longer = sorted((height, width))
        return (
            shorter > 0
            and longer <= self.max_ratio * shorter
            and shorter >= (self.min_side or 1)
            and longer <= (self.max_side or longer)
        )

    def _limits(self) -> str:
        limits = {
            "max_ratio": self.max_ratio,
            "min_side": self.min_side,
            "max_side": self.max_side,
        }
        return ", ".join(f"{name} {limit}" for name, limit in limits.items() if limit)


@dataclass(frozen=True, eq=False)
class Bucket:
    """The images of one size.

    Args:
        size: (height, width) that they are cropped to.
        items: Their indices [n] in the data set, ascending.
        sides: Their own heights and widths [n, 2].
    """

    size: Size
    items: np.ndarray
    sides: np.ndarray

    @cached_property
    def num_enlarged(self) -> int:
        """Images that are smaller than the size that covers the bucket."""
        return sum(covering_size((h, w), self.size)[0] > h for h, w in self.sides.tolist())

    @property
    def mean_crop(self) -> float:
        """The mean share of an image's area that is cropped away."""
        areas = [math.prod(covering_size((h, w), self.size)) for h, w in self.sides.tolist()]
        return float(1 - (math.prod(self.size) / np.array(areas)).mean())


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """The items of each bucket, and the order in which they are visited.

    A bucket of N items is an endless stream of random permutations of them, cut into batches of B.
    Epoch e has its batches floor(e N / B) up to floor((e + 1) N / B), those of all buckets together
    in a random order. Nothing is dropped: what does not fill a batch in one epoch fills it in a
    later one.

    Args:
        buckets: The buckets.
        seed: The seed of the order.
        batch_size: B, samples of a step on all processes.
    """

    buckets: list[Bucket]
    seed: int
    batch_size: int

    def batch(self, step: int) -> tuple[Bucket, Callable[[int], int]]:
        """Return the batch of a step.

        Args:
            step: The optimizer step.

        Returns:
            Its bucket, and a function that gives, for a position in the batch, the place in the
            bucket's items.
        """
        b, number = self._place(step)
        bucket = self.buckets[b]
        stream = key(self.seed, *bucket.size, "order in a bucket")
        start = number * self.batch_size
        return bucket, lambda position: permuted(stream, start + position, len(bucket.items))

    def size_of(self, i: int) -> Size:
        """Return (height, width) to which item i is cropped."""
        return self.buckets[int(self._bucket_of[i])].size

    def table(self) -> str:
        """Return a table for people of what goes where."""
        rows = [("height x width", "images", "enlarged", "cropped away", "batches an epoch")]
        for bucket in self.buckets:
            height, width = bucket.size
            crop = f"{100 * bucket.mean_crop:.1f} %"
            numbers = self._numbers(len(bucket.items), bucket.num_enlarged, crop)
            rows.append((f"{height} x {width}", *numbers))
        enlarged = sum(bucket.num_enlarged for bucket in self.buckets)
        rows.append(("all", *self._numbers(sum(self.counts), enlarged, "")))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells))
        return "\n".join(lines)

    @property
    def counts(self) -> list[int]:
        """The number of items of each bucket."""
        return [len(bucket.items) for bucket in self.buckets]

    @cached_property
    def _bucket_of(self) -> np.ndarray:
        """The bucket [N] of each item."""
        found = np.empty(sum(self.counts), dtype=np.int32)
        for b, bucket in enumerate(self.buckets):
            found[bucket.items] = b
        return found

    def _numbers(self, num: int, num_enlarged: int, crop: str) -> tuple[str, str, str, str]:
        """Return the cells of a row of the table."""
        return str(num), str(num_enlarged), crop, f"{num / self.batch_size:.2f}"

    def _num_before(self, epoch: int) -> list[int]:
        """Return how many batches each bucket has in all epochs before this one."""
        return [epoch * count // self.batch_size for count in self.counts]

    def _place(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of its batch in this bucket."""
        # The batches of this epoch, bucket after bucket; bucket b has those from ends[b] on.
        epoch = self._epoch(step)
        before = np.array(self._num_before(epoch))
        after = np.array(self._num_before(epoch + 1))
        ends = np.concatenate([[0], np.cumsum(after - before)])

        # Their random order, up to this step.
        num = int(ends[-1])
        generator = torch.Generator().manual_seed(key(self.seed, epoch, num, "order of buckets"))
        order = torch.randperm(num, generator=generator).numpy()
        visited = order[: step - int(before.sum()) + 1]
        b = int(np.searchsorted(ends, visited[-1], side="right")) - 1
        of_bucket = (ends[b] <= visited[:-1]) & (visited[:-1] < ends[b + 1])
        return b, int(before[b] + of_bucket.sum())

    def _epoch(self, step: int) -> int:
        """Return the last epoch that begins at this step or before."""
        low, high = 0, 1
        while sum(self._num_before(high)) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._num_before(middle)) <= step:
                low = middle
            else:
                high = middle
        return low


def assign(sides: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Find the size whose aspect ratio is nearest in logarithm; of equal ones the larger size.

    Args:
        sides: Heights and widths [n, 2] of images.
        sizes: (height, width) of the buckets.

    Returns:
        The place [n] in `sizes` for each image.
    """
    order = np.array(sorted(range(len(sizes)), key=lambda b: -math.prod(sizes[b])))
    ratios = np.log([sizes[b][1] / sizes[b][0] for b in order])
    own = np.log(sides[:, 1] / sides[:, 0])
    nearest: np.ndarray = order[np.abs(own[:, None] - ratios).argmin(axis=1)]
    return nearest


def read_sizes(dataset: MapDataset, resolution: int) -> np.ndarray:
    """Read the sizes of all images from their headers. Collective.

    An unreadable image counts as a square: it is reported where it is decoded.

    Args:
        dataset: N images.
        resolution: Side of the square.

    Returns:
        Heights and widths [N, 2].
    """
    mine = range(process_index(), len(dataset), num_processes())
    sides = torch.zeros(len(dataset), 2, dtype=torch.int64)

    def read() -> None:
        with ThreadPoolExecutor(READERS) as pool:
            sizes = pool.map(partial(size_or_square, dataset, resolution), mine, chunksize=64)
            for i, size in zip(mine, sizes, strict=True):
                sides[i] = torch.tensor(size)

    on_all(read)
    return sum_over_processes(sides).numpy()


def size_or_square(dataset: MapDataset, resolution: int, i: int) -> Size:
    """Return (height, width) of image i, or resolution x resolution if it cannot be read."""
    try:
        return dataset.size(i)
    except UnreadableImage:
        return resolution, resolution
