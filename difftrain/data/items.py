"""What a data set yields: a decoded image or clip with its label and caption, under the name by which an error message calls it.

A data set is either a table (`ImageDataset`: any item by its index) or a stream (`ImageStream`: rows in order). An image
that cannot be decoded raises `UnreadableImage` where it is read; what then happens is the reader's choice.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import PIL.Image
import torch
from torch import Tensor

from difftrain.batch import Cond
from difftrain.data.transform import Geometry, Placed, Size, Transform
from difftrain.registry import InputError
from difftrain.rng import Rng

# What Pillow's decoders raise on damaged files.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
    RuntimeError, struct.error, zlib.error, PIL.Image.DecompressionBombError,
)  # fmt: skip


class UnreadableImage(Exception):
    """An image that cannot be decoded; name: what to call it, reason: why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


@dataclass(frozen=True)
class Item:
    """One image, decoded. name: the file's path, or `row 17`."""

    image: PIL.Image.Image
    label: int | None = None
    caption: str | None = None
    name: str = ""

    def pixels(self, transform: Transform, rng: Rng | None = None) -> Tensor:
        """[C, H, W] uint8."""
        return transform(self.image, rng, self.name)

    def place(self, transform: Transform, rng: Rng | None = None, size: Size | None = None) -> Placed:
        """Pixels [C, H, W] of a stated size, with their geometry."""
        return transform.place(self.image, rng, self.name, size)


@dataclass(frozen=True)
class Clip:
    """Frames of one size in the order of time, decoded. name: the file's path and which frames these are."""

    frames: Sequence[PIL.Image.Image]
    label: int | None = None
    caption: str | None = None
    name: str = ""

    def pixels(self, transform: Transform, rng: Rng | None = None) -> Tensor:
        """[C, F, H, W] uint8. Draws are keyed by the sample, so all frames get the same crop and flip."""
        return torch.stack([transform(frame, rng, self.name) for frame in self.frames], dim=1)

    def place(self, transform: Transform, rng: Rng | None = None, size: Size | None = None) -> Placed:
        """Pixels [C, F, H, W] of a stated size."""
        placed = [transform.place(frame, rng, self.name, size) for frame in self.frames]
        return Placed(torch.stack([pixels for pixels, _ in placed], dim=1), None)


class ImageDataset(Protocol):
    """Items by index. All of them have a label or none has; the same for captions.

    A data set of clips says so by an attribute `num_frames`, the same for each of them.
    """

    class_names: list[str] | None

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any:
        """An Item, or a Clip."""
        ...


@runtime_checkable
class ImageStream(Protocol):
    """Items that can only be read in order, each process its own share of them."""

    class_names: list[str] | None

    def rows(self, seed: int, process_index: int, num_processes: int) -> Iterator[Any]:
        """Undecoded rows of this process's share, without end, in an order keyed by the seed."""
        ...

    def item(self, row: Any) -> Item: ...


@dataclass(frozen=True)
class Sample:
    """What one sample brings to its micro-batch; None: what it does not bring. Tensors are without the batch's dimension."""

    label: int | None = None
    caption: str | None = None
    pixels: Tensor | None = None
    geometry: Geometry | None = None
    moments: Tensor | None = None
    cond: Cond | None = None
    weight: float | None = None
    name: str = ""


def weight_of(dataset: Any, i: Any) -> float | None:
    """What item i counts in the loss, where a data set says so; None: as much as every other."""
    return dataset.weight(i) if hasattr(dataset, "weight") else None


@runtime_checkable
class SampleSource(Protocol):
    """A table that makes its samples itself, such as a cache, rather than from decoded items."""

    def sample(self, i: int, rng: Rng, size: Size | None = None) -> Sample:
        """Sample of item i. rng: that of the sample; size: (height, width) of its bucket."""
        ...


def frames_of(dataset: ImageDataset | ImageStream) -> int | None:
    """Frames of each clip of a data set; None where the items are images."""
    return getattr(dataset, "num_frames", None)


def refuse_clips(dataset: ImageDataset | ImageStream, key: str) -> None:
    """For what looks at images alone."""
    if frames_of(dataset) is not None:
        raise InputError(f"{key}: these are clips, and only images can be scored; there is no metric for videos yet. Write a data set of "
                         "images.")


@dataclass(frozen=True)
class Images:
    """A data set as tensors: pixels [N, C, H, W] uint8, labels [N] long; and its captions."""

    pixels: Tensor
    labels: Tensor | None
    captions: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(dataset: ImageDataset, transform: Transform, limit: int | None = None) -> Images:
    """The data set through `transform.deterministic()`; with a limit that many, evenly spread (a folder is sorted by class).

    An unreadable image raises InputError with its name, and so do clips.
    """
    refuse_clips(dataset, "data")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    fixed, side = transform.deterministic(), transform.resolution
    pixels = torch.empty(count, transform.channels, side, side, dtype=torch.uint8)
    labels, captions = [], []
    for n in range(count):
        try:
            item = dataset[n * len(dataset) // count]
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error
        pixels[n] = item.pixels(fixed)
        labels.append(item.label)
        captions.append(item.caption)
    return Images(pixels, label_tensor(labels), None if None in captions else captions)


def label_tensor(labels: Sequence[int | None]) -> Tensor | None:
    """Labels as [N] long; None where the data set has none."""
    return None if None in labels else torch.tensor(labels, dtype=torch.long)


def open_image(source: str | Path | IO[bytes], name: str) -> PIL.Image.Image:
    """The decoded image of a file (the first frame of an animation), or UnreadableImage."""
    try:
        return decoded(source)
    except PIL.UnidentifiedImageError:
        reason = "not in an image format that Pillow knows"
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
    # Out here, so that it holds no decoder: that of a damaged AVIF has threads, and a worker forked beside it hangs on freeing it.
    raise UnreadableImage(name, reason)


def decoded(source: str | Path | IO[bytes]) -> PIL.Image.Image:
    with PIL.Image.open(source) as image:
        image.load()
        return image
