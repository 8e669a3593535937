"""As many samples of a set as are needed, in an order that does not depend on their number."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from difftrain.core.rng import Rng
from difftrain.evaluation.sources.base import SampleBlock, Source


class ShuffledPart(Source):
    """The first samples of a set in random order, in whole blocks.

    A larger part begins with the blocks of a smaller one, so stored rows of one serve the other.

    Args:
        source: The set, which can give any samples together.
        at_least: How many samples are needed; fewer if the set has not so many.
    """

    def __init__(self, source: Source, at_least: int):
        self.source = source
        self.shape, self.items_are = source.shape, source.items_are
        self.block_size, self.has_labels = source.block_size, source.has_labels
        self.sizes_differ = source.sizes_differ
        size = source.stored_together
        whole_blocks = -(-at_least // size) * size
        order = torch.randperm(len(source), generator=Rng(0).shared("part of a set"))
        self.chosen: list[int] = order[:whole_blocks].tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def total(self) -> int:
        """The samples of the whole set."""
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the whole set. Collective."""
        return {"shuffled": self.source.identity()}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the samples of each list of indices."""
        return self.source.blocks([self.chosen[i] for i in indices] for indices in wanted)

    def name_of(self, index: int) -> str:
        """Return what a message calls a sample."""
        return self.source.name_of(self.chosen[index])
