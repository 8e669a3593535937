"""The images of a data set."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.files import DIGESTS, cache_home
from difftrain.data.contents import content_digest
from difftrain.data.items import Item, MapDataset, label_tensor, refuse_other_than_images
from difftrain.data.opening import OPENED, OPENING, UnreadableImage, opened, upright
from difftrain.data.transform import Size, Transform, to_pixels
from difftrain.data.unreadable import decodes_to_look
from difftrain.evaluation.sources.base import REMEDY_OF_SIZES, SampleBlock, Source
from difftrain.evaluation.sources.resizing import Resizing, ShorterSide

Look = tuple[Size, str]  # (height, width) of the upright image, and Pillow's mode
Decoded = tuple[Tensor, int | None, str | None]  # pixels, label, caption

NUM_DECODERS = 4  # threads
AHEAD = 8  # images that are decoded before they are asked for, where a block has fewer
GREY = ("1", "L")  # modes of pictures of one channel


class DatasetImages(Source):
    """The images of a data set, through a transform or as they are.

    The next block is decoded while one is looked at.

    Args:
        dataset: The data set, whose items are images.
        transform: What turns an image into pixels; its deterministic form is used. None takes
            images as they are, opened as a transform does. They are grey where all of them are, and
            else RGB. They may have several sizes, see `sizes_differ`.
        resizing: Brings the sizes of images together, where there is no transform.

    Raises:
        InputError: If an image cannot be read, or if the items are not images.
    """

    def __init__(
        self,
        dataset: MapDataset,
        transform: Transform | None = None,
        resizing: Resizing | None = None,
    ):
        refuse_other_than_images(dataset, "evaluation")
        self.dataset, self.resizing = dataset, resizing
        first = self._item(0)
        self.first_name, self.has_labels = first.name, first.label is not None
        self.has_captions = first.caption is not None
        self.transform: Transform | ShorterSide | None = None
        if transform is not None:
            self.transform = transform.deterministic()
            self.channels: int = transform.channels
        else:
            looks = self._looks(first)
            self.channels = 1 if all(mode in GREY for _, (_, mode) in looks) else 3
            self.sizes_differ = self._difference(looks)
            if resizing is not None:
                self.transform = resizing.transform(self.channels)
        self.shape = tuple(self._pixels(first).shape)
        if self.sizes_differ:
            self.block_size = 1

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> dict[str, Any]:
        """Return a digest of the images' bytes, labels and captions, and how they are opened.

        Collective.
        """
        memory = cache_home() / DIGESTS
        return {
            "content": content_digest(self.dataset, range(len(self.dataset)), memory),
            "transform": repr(self.transform),
            "opening": OPENING,
        }

    def described(self) -> dict[str, Any]:
        """Return how files are opened, and resized."""
        found: dict[str, Any] = {"opened": OPENED}
        return found if self.resizing is None else found | {"resized": self.resizing.described()}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the images of each list of indices, decoded at least one block ahead."""
        ahead = -(-AHEAD // self.block_size)
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            waiting: list[list[Future[list[Decoded]]]] = []
            for indices in wanted:
                waiting.append([pool.submit(self._decoded, part) for part in parts_of(indices)])
                if len(waiting) > ahead:
                    yield block_of(waiting.pop(0))
            for futures in waiting:
                yield block_of(futures)

    def name_of(self, index: int) -> str:
        """Return what a message calls an image: its file, or its row."""
        return self.dataset.name_of(index)

    def _decoded(self, indices: Sequence[int]) -> list[Decoded]:
        found: list[Decoded] = []
        for index in indices:
            item = self._item(index)
            found.append((self._pixels(item), item.label, item.caption))
        return found

    def _pixels(self, item: Item) -> Tensor:
        """Return the pixels of an item, of the one size unless sizes differ.

        Raises:
            InputError: If it has another size, or is the first one with colours.
        """
        image, name = item.image, item.name
        try:
            if self.transform is not None:
                pixels = self.transform(image, None, name)
            else:
                pixels = to_pixels(opened(image, 1 if self.channels == 1 else 3, name))
        except UnreadableImage as error:
            raise named(error) from error
        is_late = not isinstance(self.transform, Transform) and self.channels == 1
        if is_late and image.mode not in GREY:
            raise InputError(
                f"{name} has the mode {image.mode}, but the images before it are grey. Convert "
                "all to RGB, or all to grey."
            )
        shape = getattr(self, "shape", tuple(pixels.shape))
        if not self.sizes_differ and tuple(pixels.shape) != shape:
            raise InputError(
                f"{self._compared(name, pixels.shape[1:], shape[1:])}. {REMEDY_OF_SIZES}."
            )
        return pixels

    def _item(self, index: int) -> Item:
        try:
            item = self.dataset[index]
        except UnreadableImage as error:
            raise named(error) from error
        assert isinstance(item, Item)
        return item

    def _looks(self, first: Item) -> list[tuple[str, Look]]:
        """Return name, size and mode of each image, without decoding files.

        Of a data set that knows no quicker way than to decode, that of the first alone.
        """
        if decodes_to_look(self.dataset):
            return [(first.name, look_of(first.image))]
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            parts = pool.map(self._headers, parts_of(range(len(self.dataset))))
            return [look for part in parts for look in part]

    def _headers(self, items: Sequence[int]) -> list[tuple[str, Look]]:
        """Return the names of images, and what their headers say."""
        found = []
        for i in items:
            # Decoding says what is wrong with a file.
            with contextlib.suppress(UnreadableImage):
                original = self.dataset.original(i)
                found.append((original.name, original.look()))
        return found

    def _difference(self, looks: Sequence[tuple[str, Look]]) -> str:
        """Say which image is the first of another size than the first one; "" if none is."""
        if not looks:
            return ""
        sizes = [
            size if self.resizing is None else self.resizing.size_of(size) for _, (size, _) in looks
        ]
        for (name, _), size in zip(looks, sizes, strict=True):
            if size != sizes[0]:
                return self._compared(name, size, sizes[0])
        return ""

    def _compared(self, name: str, size: Sequence[int], first_size: Sequence[int]) -> str:
        (height, width), (first_height, first_width) = size, first_size
        after = "" if self.resizing is None else " after the resize"
        return (
            f"{name} is {width}x{height}{after}, but {self.first_name} is "
            f"{first_width}x{first_height}"
        )


def named(error: UnreadableImage) -> InputError:
    """Return the error that names an image that cannot be read, with what to do."""
    return InputError(f"{error}. Repair or remove it.")


def look_of(image: PIL.Image.Image) -> Look:
    """Return the size of a decoded image when it is upright, and its mode."""
    turned = upright(image)
    return (turned.height, turned.width), image.mode


def parts_of(indices: Sequence[int]) -> list[Sequence[int]]:
    """Divide indices into consecutive parts, one for each thread."""
    size = max(1, -(-len(indices) // NUM_DECODERS))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def block_of(futures: list[Future[list[Decoded]]]) -> SampleBlock:
    """Gather decoded images into a block."""
    decoded = [image for future in futures for image in future.result()]
    pixels, labels, captions = zip(*decoded, strict=True)
    known = [caption for caption in captions if caption is not None]
    return SampleBlock(
        torch.stack(pixels),
        label_tensor(labels),
        known if len(known) == len(captions) else None,
    )
