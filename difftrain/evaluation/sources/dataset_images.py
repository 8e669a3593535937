"""The images of a data set."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.files import cache_home
from difftrain.data.contents import content_digest
from difftrain.data.images import DAMAGED, UnreadableImage
from difftrain.data.items import Item, MapDataset, label_tensor, refuse_other_than_images
from difftrain.data.transform import Transform, to_pixels
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.stored import DIGESTS

Look = tuple[tuple[int, int], str]  # (width, height) and mode, as Pillow has them

NUM_DECODERS = 4  # threads
# What decides the pixels beside the file: Pillow's decoders, and the way they are called here
OPENING = {"way": 1, "pillow": PIL.__version__}


class DatasetImages(Source):
    """The images of a data set, through a transform or as they are.

    The next block is decoded while one is looked at.

    Args:
        dataset: The data set, whose items are images.
        transform: What turns an image into pixels; its deterministic form is used. None takes
            images as they are: all must have one size and mode then.
        leave_out: Names of files that do not belong to the set.
        limit: The most images that are taken, evenly spread, since a folder is sorted by class.

    Raises:
        InputError: If no image is left, if one cannot be read, if they differ in size or mode, or
            if the items are not images.
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
        self.look: Look = (first.image.size, first.image.mode)
        self.mode = "L" if first.image.mode in ("1", "L") else "RGB"
        self.shape = tuple(self._pixels(first).shape)
        if self.transform is None:
            self._check_headers()

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

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the images of each list of indices, decoded one block ahead."""
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            waiting: list[list[Future[tuple[Tensor, Item]]]] = []
            for indices in wanted:
                waiting.append([pool.submit(self._decoded, i) for i in indices])
                if len(waiting) > 1:
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
        self._check_look(item.name, (item.image.size, item.image.mode))
        return to_pixels(item.image.convert(self.mode))

    def _item(self, index: int) -> Item:
        try:
            item = self.dataset[self.chosen[index]]
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error
        assert isinstance(item, Item)
        return item

    def _check_headers(self) -> None:
        """Check sizes and modes of all files without decoding, so that an error costs no hour."""
        if not isinstance(self.dataset.original(self.chosen[0]).source, Path):
            return

        def check(i: int) -> None:
            try:
                source = self.dataset.original(i).source
                if not isinstance(source, Path):
                    return
                with PIL.Image.open(source) as image:
                    look = (image.size, image.mode)
            except (UnreadableImage, *DAMAGED):  # decoding says what is wrong with it
                return
            self._check_look(str(source), look)

        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            for _ in pool.map(check, self.chosen):
                pass

    def _check_look(self, name: str, look: Look) -> None:
        if look != self.look:
            (width, height), mode = look
            (first_width, first_height), first_mode = self.look
            raise InputError(
                f"{name} is {width}x{height} {mode}, but {self.first_name} is "
                f"{first_width}x{first_height} {first_mode}: expected images of one size and mode."
            )


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
