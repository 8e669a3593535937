"""The samples of a data set of tensors."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from difftrain.core.errors import InputError
from difftrain.core.files import DIGESTS, cache_home
from difftrain.data.contents import content_digest
from difftrain.data.items import MapDataset, TensorItem, label_tensor
from difftrain.evaluation.sources.base import SampleBlock, Source


class DatasetTensors(Source):
    """The samples of a data set of tensors, as float32.

    Args:
        dataset: The data set, whose items are `TensorItem`s of one shape.

    Raises:
        InputError: If the data set is empty, or if its items are not tensors.
    """

    items_are = "tensors"

    def __init__(self, dataset: MapDataset):
        if dataset.items_are != "tensors":
            raise InputError(
                f"expected a data set of tensors, but its items are {dataset.items_are}. Use "
                "DatasetImages for images."
            )
        if not len(dataset):
            raise InputError("the data set has no items to compare with.")
        self.dataset = dataset
        first: TensorItem = dataset[0]
        self.shape = tuple(first.values.shape)
        self.has_labels = first.label is not None

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> dict[str, Any]:
        """Return a digest of the values and labels of all samples. Collective."""
        memory = cache_home() / DIGESTS
        return {"content": content_digest(self.dataset, range(len(self.dataset)), memory)}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Yield the samples of each list of indices."""
        for indices in wanted:
            yield self._block(indices)

    def name_of(self, index: int) -> str:
        """Return what a message calls a sample."""
        return self.dataset.name_of(index)

    def _block(self, indices: list[int]) -> SampleBlock:
        items = [self.dataset[i] for i in indices]
        for i, item in zip(indices, items, strict=True):
            if tuple(item.values.shape) != self.shape:
                raise InputError(
                    f"{self.name_of(i)} has the shape {list(item.values.shape)}, but the first "
                    f"sample has {list(self.shape)}: expected samples of one shape."
                )
        values = torch.stack([item.values for item in items]).float()
        return SampleBlock(values, label_tensor([item.label for item in items]))
