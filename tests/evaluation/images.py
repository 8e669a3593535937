"""Images of the tests: a source that holds them, and folders that hold them as files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from difftrain.evaluation.sources import Block
from difftrain.sampling import to_pil
from difftrain.storage import digest


def random_images(num: int, seed: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randint(0, 256, (num, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Held:
    """Images in memory. asked: the blocks that were asked for, in turn."""

    has_captions = False
    every_process_takes_part = False
    makes_meanwhile = False

    def __init__(self, images: Tensor, labels: Tensor | None = None, block_size: int = 8):
        self.images, self.labels, self.block_size = images, labels, block_size
        self.has_labels, self.shape = labels is not None, tuple(images.shape[1:])
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        return {"digest": digest(self.images, self.labels)}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[Block]:
        for indices in wanted:
            self.asked.append(indices)
            yield Block(self.images[indices], self.labels[indices] if self.labels is not None else None)

    def name_of(self, index: int) -> str:
        return f"image {index}"


def written(images: Tensor, folder: Path, suffix: str = ".png") -> Path:
    """The images as files 0000.png, 0001.png ... of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        to_pil(image).save(folder / f"{i:04d}{suffix}")
    return folder
