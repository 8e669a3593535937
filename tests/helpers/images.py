"""Images of the tests: a source that holds samples in memory, and folders of image files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.evaluation.sources.base import SampleBlock, Source, block_samples
from difftrain.generation.pictures import to_pil


def random_images(num: int, seed: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    """Random images [num, *shape] uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, *shape), generator=generator, dtype=torch.uint8)


def all_samples(source: Source) -> Tensor:
    """Every sample of a set, [N, ...]."""
    return torch.cat(list(block_samples(source)))


class Held(Source):
    """Samples in memory.

    Attributes:
        asked: The blocks that were asked for, in turn.
    """

    def __init__(self, samples: Tensor, labels: Tensor | None = None, block_size: int = 8):
        self.samples, self.labels, self.block_size = samples, labels, block_size
        self.items_are = "tensors" if samples.is_floating_point() else "images"
        self.has_labels, self.shape = labels is not None, tuple(samples.shape[1:])
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self) -> dict[str, str]:
        return {"digest": digest(self.samples, self.labels)}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        for indices in wanted:
            self.asked.append(indices)
            labels = None if self.labels is None else self.labels[indices]
            yield SampleBlock(self.samples[indices], labels)

    def name_of(self, index: int) -> str:
        return f"image {index}"


def written(images: Tensor, folder: Path, suffix: str = ".png") -> Path:
    """Write images as files 0000.png, 0001.png ... of a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        to_pil(image).save(folder / f"{i:04d}{suffix}")
    return folder
