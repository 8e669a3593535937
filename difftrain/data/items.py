"""What a data set is, and what it yields: images, clips or tensors, with labels and captions.

A data set is either map-style (`MapDataset`: any item by its index) or a stream (`StreamDataset`:
rows in order). Both answer every question about themselves through methods with defaults, so a data
set of your own overrides what differs, and nothing else has to know about it.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import Registry
from difftrain.core.rng import Rng
from difftrain.data.batch import Sample, SampleSource
from difftrain.data.captions import Captions, described
from difftrain.data.images import Original
from difftrain.data.left_out import LeftOut
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Placed, Size, Transform
from difftrain.objective.types import Cond

DATASETS = Registry("data", "where images, clips or tensors come from", ["difftrain.data.datasets"])

ItemKind = Literal["images", "clips", "tensors"]


@dataclass(frozen=True)
class Item:
    """One decoded image.

    Args:
        image: The image.
        label: Its class id, if it has one.
        caption: Its caption, if it has one.
        name: What a message calls it: the file's path, or "row 17".
    """

    image: PIL.Image.Image
    label: int | None = None
    caption: str | None = None
    name: str = ""
    kind: ClassVar[ItemKind] = "images"

    def pixels(self, transform: Transform, rng: Rng | None = None) -> Tensor:
        """Return the transformed pixels [C, H, W] uint8."""
        return transform(self.image, rng, self.name)

    def place(
        self, transform: Transform, rng: Rng | None = None, size: Size | None = None
    ) -> Placed:
        """Return the transformed pixels [C, H, W] uint8 of a stated size, with their geometry."""
        return transform.place(self.image, rng, self.name, size)

    def sample(self, transform: Transform | None, rng: Rng, size: Size | None = None) -> Sample:
        """Return the image as a sample, with its caption as it is."""
        assert transform is not None, "images need a transform"
        pixels, geometry = self.place(transform, rng, size)
        return Sample(self.label, self.caption, pixels, geometry, name=self.name)


@dataclass(frozen=True)
class Clip:
    """Decoded frames of one size, in the order of time.

    Args:
        frames: The frames.
        label: The clip's class id, if it has one.
        caption: Its caption, if it has one.
        name: What a message calls it: the file's path, and which frames these are.
    """

    frames: Sequence[PIL.Image.Image]
    label: int | None = None
    caption: str | None = None
    name: str = ""
    kind: ClassVar[ItemKind] = "clips"

    def pixels(self, transform: Transform, rng: Rng | None = None) -> Tensor:
        """Return the transformed pixels [C, F, H, W] uint8.

        Random numbers belong to the sample, so all frames get the same crop and flip.
        """
        return torch.stack([transform(frame, rng, self.name) for frame in self.frames], dim=1)

    def place(
        self, transform: Transform, rng: Rng | None = None, size: Size | None = None
    ) -> Placed:
        """Return the transformed pixels [C, F, H, W] uint8 of a stated size."""
        placed = [transform.place(frame, rng, self.name, size) for frame in self.frames]
        return Placed(torch.stack([pixels for pixels, _ in placed], dim=1), None)

    def sample(self, transform: Transform | None, rng: Rng, size: Size | None = None) -> Sample:
        """Return the clip as a sample, with its caption as it is."""
        assert transform is not None, "clips need a transform"
        pixels, geometry = self.place(transform, rng, size)
        return Sample(self.label, self.caption, pixels, geometry, name=self.name)


@dataclass(frozen=True)
class TensorItem:
    """One sample that is not a picture: x0 itself, which no transform touches.

    Args:
        values: x0, of any shape, in floating point. All items of a data set have one shape.
        label: Its class id, if it has one.
        cond: Conditioning tensors by the network's argument names, without the batch's dimension.
        name: What a message calls it.

    Raises:
        InputError: If the values are not in floating point.
    """

    values: Tensor
    label: int | None = None
    cond: Cond | None = None
    name: str = ""
    caption: ClassVar[str | None] = None
    kind: ClassVar[ItemKind] = "tensors"

    def __post_init__(self) -> None:
        if not self.values.is_floating_point():
            raise InputError(
                f"data: {self.name or 'a TensorItem'} has values of type {self.values.dtype}, "
                "expected floating point. Write values.float()."
            )

    def sample(self, transform: Transform | None, rng: Rng, size: Size | None = None) -> Sample:
        """Return the values as a sample."""
        assert transform is None, "tensors take no transform"
        return Sample(self.label, cond=self.cond, name=self.name, values=self.values)


class Dataset(ABC):
    """What map-style data sets and streams have in common.

    Attributes:
        class_names: Names of the classes by id; None where there are no labels or no names.
        num_frames: Frames of each clip; None where the items are not clips.
        item_shape: Shape of each item of a data set of tensors; None of images and clips.
        is_stream: Whether items can only be read in order.
    """

    class_names: list[str] | None = None
    num_frames: int | None = None
    item_shape: tuple[int, ...] | None = None
    is_stream: ClassVar[bool]

    @abstractmethod
    def item(self, key: Any) -> Any:
        """Read one `Item`, `Clip` or `TensorItem`.

        Args:
            key: An index of a map-style data set, or a row of a stream.

        Raises:
            UnreadableImage: If the item cannot be decoded.
        """

    @abstractmethod
    def is_labelled(self) -> bool:
        """Return whether the items have labels."""

    def shown(self, key: Any, captions: Captions) -> Captions:
        """Return how the caption of an item is shown; the default: as that of every item."""
        return captions

    def weight(self, key: Any) -> float | None:
        """Return what an item counts in the loss; None: as much as every other item."""
        return None

    def not_opened(self) -> list[UnreadableImage]:
        """Return files that were found to be unreadable when the data set was opened.

        They are no items of it. Whoever reads the data set asks `loader.on_error` about them.
        """
        return []

    def left_out(self) -> list[LeftOut]:
        """Return what lies there and is not in the data set, and why."""
        return []

    def sample_source(
        self, transform: Transform | None, captions: Captions | None = None
    ) -> SampleSource:
        """Return what makes the samples of training. The default decodes items.

        Args:
            transform: Turns images into pixels; None for a data set of tensors.
            captions: How captions are shown; None: as they are, if there are any.
        """
        return DecodedSamples(self, transform, captions)

    @property
    def items_are(self) -> ItemKind:
        """What the items are: "images", "clips" or "tensors"."""
        if self.item_shape is not None:
            return "tensors"
        return "images" if self.num_frames is None else "clips"


class MapDataset(Dataset):
    """Items by index. All of them have a label or none has; the same holds for captions.

    A data set of your own defines `__len__` and `__getitem__`, which returns an `Item`, a `Clip` or
    a `TensorItem`. Of clips it also sets `num_frames`, of tensors `item_shape`. All other questions
    about a data set have a default here, which decodes items where it must; override it where there
    is a quicker way.
    """

    is_stream = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Any: ...

    def item(self, key: int) -> Any:
        """Read item `key`; see `Dataset.item`."""
        return self[key]

    def is_labelled(self) -> bool:
        """Return whether the items have labels, as the first readable item says.

        Raises:
            InputError: If no item can be read.
        """
        problem: UnreadableImage | None = None
        for i in range(len(self)):
            try:
                return self[i].label is not None
            except UnreadableImage as error:
                problem = problem or error
        raise InputError(f"data: none of the {len(self)} items can be read. The first: {problem}.")

    def label_counts(self) -> Counter[int] | None:
        """Count the items by class id; None where they have no labels.

        The default decodes every item. A data set that knows its labels overrides it. Items that
        cannot be read do not count.
        """
        if not self.is_labelled():
            return None
        counts = Counter[int]()
        for i in range(len(self)):
            try:
                label = self[i].label
            except UnreadableImage:
                continue
            if label is not None:
                counts[label] += 1
        return counts

    def is_captioned(self) -> bool:
        """Return whether the items have captions, as the first one says."""
        _, caption = next(self.captions())
        return caption is not None

    def original(self, i: int) -> Original:
        """Return what is known of image i before it is decoded.

        The default decodes the image. A data set of files overrides it.

        Raises:
            UnreadableImage: If the image cannot be found.
        """
        item = self[i]
        assert isinstance(item, Item), "only images have an original"
        return Original(item.name, item.label, lambda: item.caption, item.image)

    def size(self, i: int) -> Size:
        """Return (height, width) of image i as it is meant to be seen.

        Raises:
            UnreadableImage: If the image's header cannot be read.
        """
        return self.original(i).size()

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield (name, caption) of the items whose caption is quick to read, at least of the first.

        The default yields the first item alone, since it has to be decoded.
        """
        first = self[0]
        yield first.name, first.caption

    def name_of(self, i: int) -> str:
        """Return what a message calls item i, without decoding it."""
        return f"row {i}"


class StreamDataset(Dataset):
    """Items that can only be read in order. Each process reads its own share of them."""

    is_stream = True

    @abstractmethod
    def rows(self, seed: int, process_index: int, num_processes: int) -> Iterator[Any]:
        """Yield undecoded rows without end, in an order that is a function of the seed.

        Args:
            seed: The seed of the order.
            process_index: The rank whose share is read.
            num_processes: How many shares there are.
        """


@dataclass(frozen=True)
class DecodedSamples:
    """Makes samples of a data set's decoded items.

    Args:
        dataset: The data set.
        transform: Turns images into pixels; None for a data set of tensors.
        captions: How captions are shown; None: as they are, if there are any.
    """

    dataset: Dataset
    transform: Transform | None
    captions: Captions | None

    def sample(self, key: Any, rng: Rng, size: Size | None = None) -> Sample:
        """Return one sample; see `difftrain.data.batch.SampleSource`.

        Raises:
            UnreadableImage: If the item cannot be decoded.
            InputError: If the item is not what the data set says, or lacks a caption.
        """
        item: Item | Clip | TensorItem = self.dataset.item(key)
        self._check_kind(item)
        sample = item.sample(self.transform, rng, size)
        self._check_shape(sample)
        caption = sample.caption
        if self.captions is not None:
            shown = self.dataset.shown(key, self.captions)
            caption = shown(described(caption, item.name), rng)
        return dataclasses.replace(sample, caption=caption, weight=self.dataset.weight(key))

    def _check_kind(self, item: Item | Clip | TensorItem) -> None:
        if item.kind != self.dataset.items_are:
            raise InputError(
                f"data: {item.name or 'an item'} is of the kind {item.kind}, but the data set "
                f"{type(self.dataset).__name__} says that its items are {self.dataset.items_are}. "
                "A data set of clips sets num_frames, one of tensors sets item_shape, one of "
                "images sets neither."
            )

    def _check_shape(self, sample: Sample) -> None:
        if sample.values is None or self.dataset.item_shape is None:
            return
        found, expected = tuple(sample.values.shape), tuple(self.dataset.item_shape)
        if found != expected:
            raise InputError(
                f"data: {sample.name or 'an item'} has the shape {found}, but the item_shape of "
                f"the data set {type(self.dataset).__name__} is {expected}. All items have this "
                "one shape."
            )


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Args:
        pixels: [N, C, H, W] uint8.
        labels: [N] long, if there are any.
        captions: N captions, if there are any.
    """

    pixels: Tensor
    labels: Tensor | None
    captions: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(dataset: MapDataset, transform: Transform, limit: int | None = None) -> Images:
    """Read a data set of images into memory, without random crop and flip.

    Args:
        dataset: The data set.
        transform: What turns an image into pixels; its `deterministic()` form is used.
        limit: The most images that are taken, evenly spread, since a folder is sorted by class.

    Raises:
        InputError: If an image is unreadable, which is named, or if the items are not images.
    """
    refuse_other_than_images(dataset, "data")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    fixed, side = transform.deterministic(), transform.resolution
    pixels = torch.empty(count, transform.channels, side, side, dtype=torch.uint8)
    labels: list[int | None] = []
    captions: list[str | None] = []
    for n in range(count):
        try:
            item = dataset[n * len(dataset) // count]
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error
        pixels[n] = item.pixels(fixed)
        labels.append(item.label)
        captions.append(item.caption)
    known = [caption for caption in captions if caption is not None]
    return Images(pixels, label_tensor(labels), known if len(known) == count else None)


def label_tensor(labels: Sequence[int | None]) -> Tensor | None:
    """Return labels as [N] long, or None where the data set has none."""
    return None if None in labels else torch.tensor(labels, dtype=torch.long)


def refuse_other_than_images(dataset: Dataset, key: str) -> None:
    """Refuse clips and tensors where images alone can be looked at.

    Args:
        dataset: The data set.
        key: What a message calls it, such as "evaluation.reference".

    Raises:
        InputError: If the items are not images.
    """
    if dataset.items_are != "images":
        raise InputError(
            f"{key}: the data set yields {dataset.items_are}, but images are needed here. Write a "
            "data set of images."
        )
