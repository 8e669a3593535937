"""`Source`: samples by index in fixed blocks. Nothing holds a whole set."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from difftrain.data.items import ItemKind

# What to do with images of several sizes
REMEDY_OF_SIZES = (
    "Write --resize SIDE --crop (in Python: resizing=Resizing(SIDE, crop=True)), or resize the "
    "files"
)
READ_AT_ONCE = 128  # samples of a data set that go through an extractor together


class SampleBlock(NamedTuple):
    """Samples of consecutive indices.

    Args:
        samples: Images [b, C, H, W] uint8, or tensors [b, ...] float32.
        labels: Their labels [b], if they have any.
        captions: Their captions, if they have any.
    """

    samples: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None


class Source(ABC):
    """N samples, the same on every process; of one shape unless `sizes_differ`.

    Attributes:
        shape: Shape of one sample.
        items_are: What the samples are.
        block_size: Samples that are asked for together.
        has_labels: Whether each block brings labels.
        has_captions: Whether each block brings captions.
        every_process_takes_part: Whether each block needs all processes (sharded weights), so
            that all of them must ask for as many blocks.
        works_ahead: Whether a block is generated while a thread extracts the one before.
        is_generated: Whether the samples are made for one evaluation, after which their rows are of
            no use.
        sizes_differ: If samples have several sizes, what a message says of the first one that has
            another; a block is one sample then, and `shape` is that of the first.
    """

    shape: tuple[int, ...]
    items_are: ItemKind = "images"
    block_size: int = READ_AT_ONCE
    has_labels: bool = False
    has_captions: bool = False
    every_process_takes_part: bool = False
    works_ahead: bool = False
    is_generated: bool = False
    sizes_differ: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def stored_together(self) -> int:
        """Samples whose rows share a file, also where they are asked for one by one."""
        return READ_AT_ONCE if self.sizes_differ else self.block_size

    @property
    def total(self) -> int:
        """Samples that the identity speaks of: more than there are here, if this is a part."""
        return len(self)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain data that holds whatever decides the samples. Collective.

        Stored rows of one identity are used again.
        """

    @abstractmethod
    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the samples of each list of consecutive indices, in turn."""

    def described(self) -> dict[str, Any]:
        """Return what a protocol says of how samples are read, besides their number and digest."""
        return {}

    def name_of(self, index: int) -> str:
        """Return what a message calls a sample."""
        return f"sample {index}"

    def consecutive(self) -> Iterator[list[int]]:
        """Yield the indices of all samples, block by block."""
        for start in range(0, len(self), self.block_size):
            yield list(range(start, min(start + self.block_size, len(self))))


def block_samples(source: Source) -> Iterator[Tensor]:
    """Yield every sample of a set, a block [b, ...] after the other."""
    for block in source.blocks(source.consecutive()):
        yield block.samples
