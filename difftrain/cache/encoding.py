"""What is missing in a cache, encoded in blocks that are dealt out to all processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from difftrain.cache.shards import Entry, ShardFolder, ShardWriter
from difftrain.data.items import ImageDataset, UnreadableImage
from difftrain.data.transform import Placed, Size, Transform, to_unit_range
from difftrain.distributed import is_main, max_over_processes, num_processes, on_all, on_main, process_index, share
from difftrain.latents import LatentEncoder
from difftrain.progress import ProgressBar
from difftrain.registry import InputError
from difftrain.rng import Rng

PIXELS_AT_ONCE, MOST_AT_ONCE = 2**21, 256  # of images that go through the VAE together
PROMPTS_AT_ONCE = 32
DECODERS = 4  # threads

Block = Sequence[int]  # numbers of wanted entries
Made = Iterable[tuple[str, Entry]]


def fill(
    store: ShardFolder, wanted: Sequence[str], deal: Callable[[list[int]], list[Block]],
    encode: Callable[[list[Block]], Iterator[Made]], what: str, unit: str,
) -> None:
    """Encode those of the wanted keys that the store lacks. Collective.

    deal: this process's blocks of the missing ones. encode: what a list of blocks becomes, block by block.
    """
    missing = on_main(lambda: look(store, wanted, what, unit))
    own = deal(missing)
    rounds = int(max_over_processes(torch.tensor(float(len(own)))))
    if not rounds:
        return
    made, writer, done = encode(own), ShardWriter(store), 0
    bar = ProgressBar(len(missing), 0, is_main(), unit, what)
    try:
        for number in range(rounds):
            block = on_all(lambda: list(next(made, ())))  # a round for all: whoever meets something wrong ends the work of all
            for key, entry in block:
                writer.add(key, entry)
            done += len(own[number]) * num_processes() if number < len(own) else 0
            bar.show(min(done, len(missing)), at_end=False)
    finally:
        writer.flush()  # an interruption loses nothing that is encoded
        bar.close()
    on_all(lambda: None)  # nobody reads before everybody has written


def look(store: ShardFolder, wanted: Sequence[str], what: str, unit: str) -> list[int]:
    """Places of the wanted keys that the store lacks, told in one line."""
    store.create()
    _, places = store.scan()
    missing = [n for n, key in enumerate(wanted) if key not in places]
    if missing:
        found = len(wanted) - len(missing)
        held = f"{found} are there already" if found else reason(store, bool(places), unit)
        print(f"{what}: {len(missing)} of {len(wanted)} {unit}s are encoded anew{f' ({held})' if held else ''}", flush=True)
    return missing


def reason(store: ShardFolder, holds_some: bool, unit: str) -> str:
    """Why none of what is there can be used; empty if nothing is there."""
    if holds_some:
        return f"the folder holds those of other {unit}s{' or sizes' if unit == 'image' else ''}"
    others = store.differing()
    return f"the folder holds those of another {' and another '.join(others)}" if others else ""


@dataclass(frozen=True)
class Crop:
    """One wanted image: item i, cropped to `size`. The key names its content, size and variant."""

    i: int
    size: Size
    key: str

    @property
    def draws(self) -> Rng:
        """The draws of crop and flip belong to the key: they are the same in every run."""
        return Rng(int(self.key[:15], 16), samples=[int(self.key[15:30], 16)])


class LatentWork:
    """The posterior's moments, and the geometry, of crops."""

    def __init__(
        self, dataset: ImageDataset, transform: Transform, encoder: LatentEncoder, crops: Sequence[Crop], device: torch.device,
        on_error: str,
    ):
        self.dataset, self.transform, self.encoder, self.crops = dataset, transform, encoder, crops
        self.device, self.on_error = device, on_error

    def deal(self, missing: list[int]) -> list[Block]:
        """Blocks of one size each, every k-th one for this process: the same blocks on any number of processes."""
        by_size: dict[Size, list[int]] = {}
        for n in missing:
            by_size.setdefault(self.crops[n].size, []).append(n)
        blocks: list[Block] = []
        for (height, width), members in by_size.items():
            many = min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width)))
            blocks += [members[start : start + many] for start in range(0, len(members), many)]
        return list(share(blocks))

    def encode(self, blocks: list[Block]) -> Iterator[Made]:
        """The next block is decoded while one is encoded."""
        waiting: list[tuple[Block, list[Future[tuple[str, Placed] | None]]]] = []
        with ThreadPoolExecutor(DECODERS) as pool:
            for block in blocks:
                waiting.append((block, [pool.submit(self.placed, n) for n in block]))
                if len(waiting) > 1:
                    yield self._encoded(*waiting.pop(0))
            for block, futures in waiting:
                yield self._encoded(block, futures)

    def placed(self, n: int) -> tuple[str, Placed] | None:
        """Name and pixels of a crop; None of an unreadable image that is skipped."""
        crop = self.crops[n]
        try:
            item = self.dataset[crop.i]
        except UnreadableImage as error:
            if self.on_error == "skip":
                return None
            raise InputError(f"{error}. Repair or remove it, or write on_error: skip.") from error
        return item.name, item.place(self.transform, crop.draws, crop.size)

    def _encoded(self, block: Block, futures: list[Future[tuple[str, Placed] | None]]) -> Made:
        images = [future.result() for future in futures]
        there = [(n, *image) for n, image in zip(block, images, strict=True) if image is not None]
        if not there:
            return []
        pixels = torch.stack([placed.pixels for _, _, placed in there])
        moments = self.encoder.moments(to_unit_range(pixels.to(self.device)), [name for _, name, _ in there]).cpu()
        return [
            (self.crops[n].key, {"moments": values, "geometry": torch.tensor(placed.geometry)})
            for (n, _, placed), values in zip(there, moments, strict=True)
        ]


class TextWork:
    """The states of prompts."""

    def __init__(self, text: Any, keys: Sequence[str], owners: Sequence[int], prompts: Mapping[str, str]):
        self.text, self.keys, self.owners, self.prompts = text, keys, owners, prompts

    def deal(self, missing: list[int]) -> list[Block]:
        """Each process has the prompts that were first met in its own share of the images."""
        mine = [n for n in missing if self.owners[n] == process_index()]
        return [mine[start : start + PROMPTS_AT_ONCE] for start in range(0, len(mine), PROMPTS_AT_ONCE)]

    def encode(self, blocks: list[Block]) -> Iterator[Made]:
        for block in blocks:
            prompts = [self.prompts[self.keys[n]] for n in block]
            states = {name: value.cpu() for name, value in self.text.encode(prompts).items()}
            yield [(self.keys[n], {name: value[row] for name, value in states.items()}) for row, n in enumerate(block)]
