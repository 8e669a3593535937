"""Encodes what is missing in a cache, in blocks that are shared out to all processes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from difftrain.core.console import ProgressBar, wing_logger
from difftrain.core.processes import (
    is_main,
    max_over_processes,
    num_processes,
    on_all,
    on_main,
    process_index,
    share,
)
from difftrain.core.rng import Rng
from difftrain.data.cache.shards import Entry, ShardFolder, ShardWriter
from difftrain.data.items import Item, MapDataset
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Placed, Size, Transform, to_unit_range
from difftrain.data.unreadable import ReadErrors
from difftrain.objective.types import Cond

logger = wing_logger(__name__)

PIXELS_AT_ONCE = 2**21  # of images that are encoded together
MOST_AT_ONCE = 256  # images that are encoded together
PROMPTS_AT_ONCE = 32
DECODERS = 4  # threads

Block = Sequence[int]  # numbers of wanted entries
Made = Iterable[tuple[str, Entry]]
Opened = tuple[str, Placed] | UnreadableImage  # the name of an image, and its crop


class MomentsEncoder(Protocol):
    """Encodes images to the posterior of their latents, such as a variational autoencoder."""

    def to(self, device: torch.device) -> Any:
        """Move the weights to a device."""
        ...

    def moments(self, pixels: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: [B, C, H, W] in [-1, 1].
            names: What messages call the B images.

        Returns:
            Mean and standard deviation of the posterior, [B, 2C, h, w].
        """
        ...

    def identity(self) -> dict[str, str]:
        """Return all that the moments depend on apart from the pixels, by name."""
        ...


class PromptEncoder(Protocol):
    """Encodes prompts to conditioning tensors, such as the text encoders of a pipeline."""

    def to(self, device: torch.device) -> Any:
        """Move the weights to a device."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Encode prompts.

        Args:
            prompts: B texts.

        Returns:
            Conditioning tensors [B, ...] by name, which do not depend on the other prompts.
        """
        ...

    def identity(self) -> dict[str, str]:
        """Return all that the states depend on apart from the prompts, by name."""
        ...


class Work(ABC):
    """Makes entries of a cache.

    Attributes:
        what: What a message calls all entries.
        unit: What a message calls one of them.
        other_entries: What is said of a cache that holds only other entries.
        keys: The keys of the wanted entries.
    """

    what: ClassVar[str]
    unit: ClassVar[str]
    other_entries: ClassVar[str]
    keys: Sequence[str]

    @abstractmethod
    def deal(self, missing: list[int]) -> list[Block]:
        """Return this process's blocks of the missing entries (places in `keys`)."""

    @abstractmethod
    def encode(self, blocks: list[Block]) -> Iterator[Made]:
        """Yield the entries of each block, in turn.

        Raises:
            InputError: If an image or a prompt cannot be encoded.
        """


def fill(store: ShardFolder, work: Work) -> None:
    """Encode the wanted entries that the store lacks. Collective.

    Args:
        store: The store.
        work: The wanted entries.

    Raises:
        InputError: If one cannot be encoded or written.
    """
    missing = on_main(lambda: find_missing(store, work))
    own = work.deal(missing)
    rounds = int(max_over_processes(torch.tensor(float(len(own)))))
    if not rounds:
        return
    made = work.encode(own)
    writer = ShardWriter(store)
    bar = ProgressBar(len(missing), 0, is_main(), work.unit, work.what)
    done = 0
    try:
        for number in range(rounds):
            # All processes take part in each round, so that an error on one ends the work of all.
            block = on_all(lambda: list(next(made, ())))
            for key, entry in block:
                writer.add(key, entry)
            if number < len(own):
                done += len(own[number]) * num_processes()
            bar.show(min(done, len(missing)), at_end=False)
    finally:
        writer.flush()  # an interruption loses nothing that is encoded
        bar.close()
    on_all(lambda: None)  # no process reads before all have written


def find_missing(store: ShardFolder, work: Work) -> list[int]:
    """Find the wanted entries that the store lacks; one message counts them.

    Args:
        store: The store, which is created if it is not there.
        work: The wanted entries.

    Returns:
        Their places in `work.keys`.
    """
    had_other_format = store.create()
    _, places = store.scan()
    wanted = work.keys
    missing = [n for n, key in enumerate(wanted) if key not in places]
    if missing:
        num_found = len(wanted) - len(missing)
        if had_other_format:
            why = "the cached ones have the format of another version of difftrain"
        elif num_found:
            why = f"{num_found} are cached"
        else:
            why = reason(store, bool(places), work)
        message = f"{work.what}: encoding {len(missing)} of {len(wanted)} {work.unit}s"
        logger.info(f"{message} ({why})" if why else message)
    return missing


def reason(store: ShardFolder, holds_some: bool, work: Work) -> str:
    """Say why no entry of the cache can be used; empty if the cache is empty.

    Args:
        store: The store.
        holds_some: Whether it holds entries at all.
        work: The wanted entries.
    """
    if holds_some:
        return work.other_entries
    others = store.differing()
    return f"the cached ones were made with a different {' and '.join(others)}" if others else ""


@dataclass(frozen=True)
class Crop:
    """One wanted crop of an image.

    Args:
        i: The image.
        size: (height, width) of the crop.
        key: The key of its content, size and variant.
    """

    i: int
    size: Size
    key: str

    @property
    def rng(self) -> Rng:
        """The random numbers of crop and flip, a function of the key: the same in every run."""
        return Rng(int(self.key[:15], 16), samples=[int(self.key[15:30], 16)])


class LatentWork(Work):
    """Encodes the posterior's moments of crops, and keeps their geometry.

    Args:
        dataset: The images.
        transform: Turns them into pixels.
        encoder: What encodes pixels.
        crops: The wanted crops.
        device: Where the encoder is.
        errors: What becomes of an image that cannot be read.
        key: The key of the images' block in the recipe.
    """

    what = "latents"
    unit = "image"
    other_entries = "the cached ones are of other images or sizes"

    def __init__(
        self,
        dataset: MapDataset,
        transform: Transform,
        encoder: MomentsEncoder,
        crops: Sequence[Crop],
        device: torch.device,
        errors: ReadErrors,
        key: str,
    ):
        self.dataset = dataset
        self.transform = transform
        self.encoder = encoder
        self.crops = crops
        self.device = device
        self.errors, self.key = errors, key
        self.keys = [crop.key for crop in crops]

    def deal(self, missing: list[int]) -> list[Block]:
        """Return every k-th block of one size, of blocks that do not depend on the processes."""
        by_size: dict[Size, list[int]] = {}
        for n in missing:
            by_size.setdefault(self.crops[n].size, []).append(n)
        blocks: list[Block] = []
        for (height, width), members in by_size.items():
            num = min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width)))
            blocks += in_blocks(members, num)
        return list(share(blocks))

    def encode(self, blocks: list[Block]) -> Iterator[Made]:
        """Yield the entries of each block, while the next block is decoded; see `Work.encode`."""
        waiting: list[tuple[Block, list[Future[Opened]]]] = []
        with ThreadPoolExecutor(DECODERS) as pool:
            for block in blocks:
                waiting.append((block, [pool.submit(self._placed, n) for n in block]))
                if len(waiting) > 1:
                    yield self._encoded(*waiting.pop(0))
            for block, futures in waiting:
                yield self._encoded(block, futures)

    def _placed(self, n: int) -> Opened:
        """Return name and pixels of a crop, or why its image cannot be read."""
        crop = self.crops[n]
        try:
            item: Item = self.dataset[crop.i]
            return item.name, item.place(self.transform, crop.rng, crop.size)
        except UnreadableImage as error:
            return error

    def _encoded(self, block: Block, futures: list[Future[Opened]]) -> Made:
        # The readable images of the block.
        keys, names, readable = [], [], []
        for n, future in zip(block, futures, strict=True):
            image = future.result()
            if isinstance(image, UnreadableImage):
                self.errors.met(image, self.key)
            else:
                name, placed = image
                keys.append(self.crops[n].key)
                names.append(name)
                readable.append(placed)
        if not readable:
            return []

        # Their moments.
        pixels = torch.stack([placed.pixels for placed in readable]).to(self.device)
        moments = self.encoder.moments(to_unit_range(pixels), names).cpu()
        geometries = [torch.tensor(placed.geometry) for placed in readable]
        entries = [
            {"moments": values, "geometry": geometry}
            for values, geometry in zip(moments, geometries, strict=True)
        ]
        return list(zip(keys, entries, strict=True))


class TextWork(Work):
    """Encodes the states of prompts.

    Args:
        text: What encodes prompts.
        keys: The keys of the wanted prompts.
        owners: The process that has the text of each.
        prompts: The texts of this process's prompts, by key.
    """

    what = "text"
    unit = "prompt"
    other_entries = "the cached ones are of other prompts"

    def __init__(
        self,
        text: PromptEncoder,
        keys: Sequence[str],
        owners: Sequence[int],
        prompts: Mapping[str, str],
    ):
        self.text = text
        self.keys = keys
        self.owners = owners
        self.prompts = prompts

    def deal(self, missing: list[int]) -> list[Block]:
        """Return blocks of the prompts that this process has read first."""
        mine = [n for n in missing if self.owners[n] == process_index()]
        return in_blocks(mine, PROMPTS_AT_ONCE)

    def encode(self, blocks: list[Block]) -> Iterator[Made]:
        """Yield the entries of each block, in turn; see `Work.encode`."""
        for block in blocks:
            keys = [self.keys[n] for n in block]
            states = self.text.encode([self.prompts[key] for key in keys])
            on_cpu = {name: value.cpu() for name, value in states.items()}
            rows = [{name: value[r] for name, value in on_cpu.items()} for r in range(len(keys))]
            yield list(zip(keys, rows, strict=True))


def in_blocks(members: list[int], num: int) -> list[Block]:
    """Cut a list into blocks of `num` members; the last one may have fewer."""
    return [members[start : start + num] for start in range(0, len(members), num)]
