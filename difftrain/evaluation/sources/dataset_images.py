"""The images of a data set."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.files import DIGESTS, cache_home
from difftrain.data.contents import content_digest
from difftrain.data.images import OPENED, OPENING, UnreadableImage
from difftrain.data.items import Item, MapDataset, label_tensor, refuse_other_than_images
from difftrain.data.transform import Size, Transform, to_pixels, upright, with_channels
from difftrain.evaluation.sources.base import SampleBlock, Source

Look = tuple[Size, str]  # (height, width) of the upright image, and Pillow's mode
Decoded = tuple[Tensor, int | None, str | None]  # pixels, label, caption

NUM_DECODERS = 4  # threads
AHEAD = 8  # images that are decoded before they are asked for, where a block has fewer


class DatasetImages(Source):
    """The images of a data set, through a transform or as they are.

    The next block is decoded while one is looked at.

    Args:
        dataset: The data set, whose items are images.
        transform: What turns an image into pixels; its deterministic form is used. None takes
            images as they are, opened as a transform does. Then all must have one mode, and files
            may have several sizes, see `sizes_differ`.
        leave_out: Names of files that do not belong to the set.
        limit: The most images that are taken, evenly spread, since a folder is sorted by class.

    Raises:
        InputError: If no image is left, if one cannot be read, if they differ in mode, or if the
            items are not images.
    """

    def __init__(
        self,
        dataset: MapDataset,
        transform: Transform | None = None,
        leave_out: tuple[str, ...] = (),
        limit: int | None = None,
    ):
        refuse_other_than_images(dataset, "evaluation")
        self.dataset = dataset
        self.transform = None if transform is None else transform.deterministic()
        # Which images
        everything = range(len(dataset))
        kept = [i for i in everything if Path(dataset.name_of(i)).name not in leave_out]
        if not kept:
            raise InputError(
                f"there are no images but {' and '.join(leave_out)}. Write the folder that holds "
                "the images."
            )
        count = len(kept) if limit is None else min(limit, len(kept))
        self.chosen = [kept[n * len(kept) // count] for n in range(count)]
        # What they look like
        first = self._item(0)
        self.has_labels = first.label is not None
        self.has_captions = first.caption is not None
        self.first_name = first.name
        self.channels = 1 if first.image.mode in ("1", "L") else 3
        self.look = look_of(upright(first.image), first.image.mode)
        self.shape = tuple(self._pixels(first).shape)
        if self.transform is None:
            self._check_headers()
        if self.sizes_differ:
            self.block_size = 1

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> dict[str, Any]:
        """Return a digest of the images' bytes, labels and captions, and how they are opened.

        Collective.
        """
        memory = cache_home() / DIGESTS
        return {
            "content": content_digest(self.dataset, self.chosen, memory),
            "transform": repr(self.transform),
            "opening": OPENING,
        }

    def described(self) -> dict[str, Any]:
        """Return how files are opened."""
        return {"opened": OPENED}

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
        return self.dataset.name_of(self.chosen[index])

    def _decoded(self, indices: Sequence[int]) -> list[Decoded]:
        found: list[Decoded] = []
        for index in indices:
            item = self._item(index)
            found.append((self._pixels(item), item.label, item.caption))
        return found

    def _pixels(self, item: Item) -> Tensor:
        if self.transform is not None:
            return item.pixels(self.transform)
        image = upright(item.image)
        self._check_look(item.name, look_of(image, item.image.mode))
        return to_pixels(with_channels(image, self.channels, item.name))

    def _item(self, index: int) -> Item:
        try:
            item = self.dataset[self.chosen[index]]
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error
        assert isinstance(item, Item)
        return item

    def _check_headers(self) -> None:
        """Look at sizes and modes of all files without decoding, so that an error costs no hour."""
        if not isinstance(self.dataset.original(self.chosen[0]).source, Path):
            return
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            for looks in pool.map(self._headers, parts_of(self.chosen)):
                for name, look in looks:
                    if look[1] == self.look[1] and look != self.look:
                        self.sizes_differ = self.sizes_differ or self._compared(name, look)
                    self._check_look(name, look)

    def _headers(self, items: Sequence[int]) -> list[tuple[str, Look]]:
        """Return the names of files, and what their headers say."""
        found = []
        for i in items:
            # Decoding says what is wrong with a file.
            with contextlib.suppress(UnreadableImage):
                original = self.dataset.original(i)
                if isinstance(original.source, Path):
                    found.append((str(original.source), original.look()))
        return found

    def _compared(self, name: str, look: Look) -> str:
        (height, width), mode = look
        (first_height, first_width), first_mode = self.look
        return (
            f"{name} is {width}x{height} {mode}, but {self.first_name} is "
            f"{first_width}x{first_height} {first_mode}"
        )

    def _check_look(self, name: str, look: Look) -> None:
        if look != self.look and not (self.sizes_differ and look[1] == self.look[1]):
            raise InputError(f"{self._compared(name, look)}: expected images of one size and mode.")


def look_of(image: PIL.Image.Image, mode: str) -> Look:
    """Return the look of an upright image that had this mode in its file."""
    return (image.height, image.width), mode


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
