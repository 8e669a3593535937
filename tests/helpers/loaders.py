"""Loaders of the tests, and what their first micro-batches hold."""

from itertools import islice
from typing import Any

from torch import Tensor

from difftrain.data.items import Dataset
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform

RANDOM = Transform(4, channels=1, resize="none", crop="random", flip=True)
FIXED = RANDOM.deterministic()


def loader(
    dataset: Dataset,
    transform: Transform | None = RANDOM,
    process: tuple[int, int] = (0, 1),
    **options: Any,
) -> Loader:
    """A loader of small batches. process: (index, number of processes)."""
    index, num = process
    settings: dict[str, Any] = {"seed": 5, "batch_size": 4, "micro_batch_size": 2, **options}
    return Loader(dataset, transform, process_index=index, num_processes=num, **settings)


def samples(
    count: int, dataset: Dataset, start_step: int = 0, **options: Any
) -> dict[tuple[int, int], tuple[int, Tensor]]:
    """{(step, position): (label, pixels)} of the first `count` micro-batches."""
    found = {}
    for batch in islice(loader(dataset, **options).batches(start_step), count):
        assert batch.labels is not None
        assert batch.pixels is not None
        for position, label, pixels in zip(batch.samples, batch.labels, batch.pixels, strict=True):
            found[batch.step, position] = int(label), pixels
    return found
