"""The images of a data set."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.data.images import DAMAGED, UnreadableImage
from difftrain.data.items import Item, MapDataset, label_tensor, refuse_other_than_images
from difftrain.data.transform import Transform, to_pixels, upright, with_channels
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.sources.base import SampleBlock, Source

Look = tuple[tuple[int, int], str]  # (width, height) of the upright image, and Pillow's mode

NUM_DECODERS = 4  # threads
AHEAD = 8  # images that are decoded before they are asked for, where a block has fewer
OPENED = "upright, white where transparent, 16 bits scaled to 8, colour profiles ignored"


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
        self.look: Look = (upright(first.image).size, first.image.mode)
        self.shape = tuple(self._pixels(first).shape)
        if self.transform is None:
            self._check_headers()
        if self.sizes_differ:
            self.block_size = 1

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> dict[str, Any]:
        """Return the data set's block, its files with their times, and the transform."""
        listing = self.dataset.listing()
        return {
            "data": part_block(self.dataset),
            "chosen": digest(str(self.chosen)),
            "transform": repr(self.transform),
            "files": None if listing is None else digest(listing),
        }

    def described(self) -> dict[str, Any]:
        """Return how files are opened."""
        return {"opened": OPENED}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the images of each list of indices, decoded at least one block ahead."""
        ahead = -(-AHEAD // self.block_size)
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            waiting: list[list[Future[tuple[Tensor, Item]]]] = []
            for indices in wanted:
                waiting.append([pool.submit(self._decoded, i) for i in indices])
                if len(waiting) > ahead:
                    yield block_of(waiting.pop(0))
            for futures in waiting:
                yield block_of(futures)

    def name_of(self, index: int) -> str:
        """Return what a message calls an image: its file, or its row."""
        return self.dataset.name_of(self.chosen[index])

    def _decoded(self, index: int) -> tuple[Tensor, Item]:
        item = self._item(index)
        return self._pixels(item), item

    def _pixels(self, item: Item) -> Tensor:
        if self.transform is not None:
            return item.pixels(self.transform)
        image = upright(item.image)
        self._check_look(item.name, (image.size, item.image.mode))
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
        if self.dataset.listing() is None:  # there are no files
            return
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            for name, look in pool.map(self._header, self.chosen):
                if look is None:  # decoding says what is wrong with it
                    continue
                if look[1] == self.look[1] and look != self.look:
                    self.sizes_differ = self.sizes_differ or self._compared(name, look)
                self._check_look(name, look)

    def _header(self, i: int) -> tuple[str, Look | None]:
        """Return a file's name, and what its header says; None without a file that can be read."""
        try:
            original = self.dataset.original(i)
            if not isinstance(original.source, Path):
                return original.name, None
            height, width = original.size()
            with PIL.Image.open(original.source) as image:
                return str(original.source), ((width, height), image.mode)
        except (UnreadableImage, *DAMAGED):
            return "", None

    def _compared(self, name: str, look: Look) -> str:
        (width, height), mode = look
        (first_width, first_height), first_mode = self.look
        return (
            f"{name} is {width}x{height} {mode}, but {self.first_name} is "
            f"{first_width}x{first_height} {first_mode}"
        )

    def _check_look(self, name: str, look: Look) -> None:
        if look != self.look and not (self.sizes_differ and look[1] == self.look[1]):
            raise InputError(f"{self._compared(name, look)}: expected images of one size and mode.")


def block_of(futures: list[Future[tuple[Tensor, Item]]]) -> SampleBlock:
    """Gather decoded images into a block."""
    decoded = [future.result() for future in futures]
    items = [item for _, item in decoded]
    captions = [item.caption for item in items if item.caption is not None]
    return SampleBlock(
        torch.stack([pixels for pixels, _ in decoded]),
        label_tensor([item.label for item in items]),
        captions if len(captions) == len(items) else None,
    )
