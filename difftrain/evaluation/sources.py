"""Images by index in fixed blocks: what is scored, and what it is scored against. Nothing holds a whole set."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import PIL.Image
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from difftrain.data.items import DAMAGED, ImageDataset, Item, UnreadableImage, label_tensor
from difftrain.data.transform import Transform, to_pixels
from difftrain.distributed import num_processes
from difftrain.registry import InputError, dump
from difftrain.sampling import SampleGenerator
from difftrain.storage import digest

BLOCK = 128  # images of a data set that are read and go through an extractor at once
DECODERS = 4


class Block(NamedTuple):
    """Images uint8 [b, C, H, W] with their labels [b] and captions, None where there are none."""

    images: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None


class ImageSource(Protocol):
    """N images of one `shape` (C, H, W), the same on every process. has_labels, has_captions: whether each block brings them.

    every_process_takes_part: each forward needs all processes (sharded weights), so all ask for as many blocks. makes_meanwhile: a block is
    made while another thread looks at the one before.
    """

    block_size: int
    shape: tuple[int, ...]
    has_labels: bool
    has_captions: bool
    every_process_takes_part: bool
    makes_meanwhile: bool

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """JSON-able, without reading the images: equal for a set that a stopped evaluation may go on with."""
        ...

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[Block]:
        """The images of each list of consecutive indices, in turn."""
        ...

    def name_of(self, index: int) -> str:
        """How a message calls the image."""
        ...


class GeneratedImages:
    """Samples 0 .. num - 1 of a network. described: what the samples are made of, beside the weights and the sampler."""

    def __init__(self, generator: SampleGenerator, denoiser: nn.Module, shape: tuple[int, ...], num: int, device: torch.device):
        self.generator, self.denoiser, self.shape, self.num, self.device = generator, denoiser, shape, num, device
        self.block_size = generator.sampling.block_size
        labels = generator.conditioning.labels_of([0])
        self.has_captions = labels is not None and generator.conditioning.captions_of(labels) is not None
        self.has_labels = labels is not None and not self.has_captions
        self.makes_meanwhile = device.type != "cpu"  # there both would want the same cores
        self.every_process_takes_part = num_processes() > 1 and any(isinstance(p, DTensor) for p in denoiser.parameters())

    def __len__(self) -> int:
        return self.num

    def identity(self) -> dict[str, Any]:
        sampling = self.generator.sampling
        described = {"sampler": dump(sampling.sampler), "guidance": sampling.guidance, "seed": sampling.seed}
        return {**described, "weights": marks_of(self.denoiser)}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[Block]:
        for indices in wanted:
            conditioning, images = self.generator.conditioning, self.generator(self.denoiser, indices, self.device)
            labels = conditioning.labels_of(indices)
            captions = conditioning.captions_of(labels) if labels is not None else None
            yield Block(images, labels if captions is None else None, captions)

    def name_of(self, index: int) -> str:
        return f"sample {index}"


def marks_of(network: nn.Module) -> str:
    """A digest of the sums of the weights and of their squares: it tells one training step from the next."""
    sums = []
    for p in network.parameters():
        wide = p.detach().double()
        parts = (wide.sum(), wide.square().sum())
        sums += [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    return digest(torch.stack(sums).cpu()) if sums else ""


class DatasetImages:
    """The images of a data set, through a transform, or as they are: then all must have one size and mode.

    leave_out: names of files that do not belong to the set. limit: at most so many, evenly spread (a folder is sorted by class).
    """

    every_process_takes_part = False
    makes_meanwhile = False  # it reads ahead in threads of its own
    block_size = BLOCK

    def __init__(
        self, dataset: ImageDataset, transform: Transform | None = None, leave_out: tuple[str, ...] = (), limit: int | None = None
    ):
        self.dataset = dataset
        self.transform = transform.deterministic() if transform is not None else None
        self.files: list[str] | None = getattr(dataset, "files", None)
        kept = [i for i in range(len(dataset)) if self.files is None or Path(self.files[i]).name not in leave_out]
        if not kept:
            raise InputError(f"no images but {' and '.join(leave_out)}. Write the folder that holds the images.")
        count = len(kept) if limit is None else min(limit, len(kept))
        self.chosen = [kept[n * len(kept) // count] for n in range(count)]
        first = self._item(0)
        self.has_labels, self.has_captions = first.label is not None, first.caption is not None
        self.kind = (first.image.size, first.image.mode)
        self.first_name = first.name
        self.mode = "L" if first.image.mode in ("1", "L") else "RGB"
        self.shape = tuple(self._pixels(first).shape)
        if self.transform is None:
            self._check_headers()

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self) -> dict[str, Any]:
        described = dump(self.dataset) if hasattr(self.dataset, "registered_as") else type(self.dataset).__name__
        return {"data": described, "chosen": digest(str(self.chosen)), "transform": repr(self.transform), "files": self._listing()}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[Block]:
        """The next block is decoded while one is looked at."""
        with ThreadPoolExecutor(DECODERS) as pool:
            waiting: list[list[Future[tuple[Tensor, Item]]]] = []
            for indices in wanted:
                waiting.append([pool.submit(self._decoded, i) for i in indices])
                if len(waiting) > 1:
                    yield joined(waiting.pop(0))
            for futures in waiting:
                yield joined(futures)

    def name_of(self, index: int) -> str:
        return self.files[self.chosen[index]] if self.files is not None else f"row {self.chosen[index]}"

    def _decoded(self, index: int) -> tuple[Tensor, Item]:
        item = self._item(index)
        return self._pixels(item), item

    def _pixels(self, item: Item) -> Tensor:
        if self.transform is not None:
            return item.pixels(self.transform)
        if (item.image.size, item.image.mode) != self.kind:
            self._refuse(item.name, item.image.size, item.image.mode)
        return to_pixels(item.image.convert(self.mode))

    def _item(self, index: int) -> Item:
        try:
            item = self.dataset[self.chosen[index]]
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error
        assert isinstance(item, Item)
        return item

    def _check_headers(self) -> None:
        """Sizes and modes of all files, without decoding: a folder of mixed images is refused at once, not after an hour."""
        root = getattr(self.dataset, "root", None)
        if self.files is None or root is None:
            return

        def header(i: int) -> None:
            assert self.files is not None
            path = Path(root, self.files[i])
            try:
                with PIL.Image.open(path) as image:
                    found = (image.size, image.mode)
            except DAMAGED:  # decoding names what is wrong with it
                return
            if found != self.kind:
                self._refuse(str(path), *found)

        with ThreadPoolExecutor(DECODERS) as pool:
            for _ in pool.map(header, self.chosen, chunksize=256):
                pass

    def _refuse(self, name: str, size: tuple[int, int], mode: str) -> None:
        (width, height), expected = self.kind
        raise InputError(f"{name} is {size[0]}x{size[1]} {mode}, but {self.first_name} is {width}x{height} {expected}: expected images of "
                         "one size and mode.")

    def _listing(self) -> str | None:
        """Names, sizes and times of the files, as a digest."""
        root = getattr(self.dataset, "root", None)
        if self.files is None or root is None:
            return None
        found = [(self.files[i], Path(root, self.files[i]).stat()) for i in self.chosen]
        return digest("".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns};" for name, stat in found))


def joined(futures: list[Future[tuple[Tensor, Item]]]) -> Block:
    images, items = zip(*(future.result() for future in futures), strict=True)
    captions = [item.caption for item in items if item.caption is not None]
    return Block(torch.stack(images), label_tensor([item.label for item in items]), captions if len(captions) == len(items) else None)


def all_images(source: ImageSource) -> Tensor:
    """Every image at once, [N, C, H, W] uint8: of sets that are known to be small."""
    wanted = (list(range(start, min(start + source.block_size, len(source)))) for start in range(0, len(source), source.block_size))
    return torch.cat([block.images for block in source.blocks(wanted)])
