"""The order in which a stream is read: whole shards in a keyed order, then rows through a buffer of bounded size.

Both orders are functions of (seed, epoch, process), so that reading again gives the same rows; they do not use the shuffling of
`datasets`, which differs between its versions.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import Any, TypeVar

from difftrain.registry import InputError
from difftrain.rng import key

T = TypeVar("T")


def shuffled_rows(source: Any, buffer: int, seed: int, process_index: int, num_processes: int) -> Iterator[Any]:
    """Rows of this process's share of a `datasets.IterableDataset`, without end; each epoch has each of them once."""
    for epoch in count():
        share = share_of_epoch(source, seed, epoch, process_index, num_processes)
        is_empty = True
        for row in through_buffer(share, buffer, Random(key(seed, epoch, process_index, "stream order"))):
            is_empty = False
            yield row
        if is_empty:
            raise InputError(f"The stream has no rows for process {process_index} of {num_processes}. Use fewer processes, or a table.")


def share_of_epoch(source: Any, seed: int, epoch: int, process_index: int, num_processes: int) -> Iterator[Any]:
    """Every num_processes-th shard where that deals them evenly, else every num_processes-th row of all of them."""
    order = list(range(source.num_shards))
    Random(key(seed, epoch, 0, "shard order")).shuffle(order)
    deals_shards = len(order) % num_processes == 0
    shards = order[process_index::num_processes] if deals_shards else order
    rows = (row for shard in shards for row in source.shard(num_shards=len(order), index=shard))
    return rows if deals_shards else islice(rows, process_index, None, num_processes)


def through_buffer(rows: Iterable[T], size: int, random: Random) -> Iterator[T]:
    """Each row once: the buffer is filled, each further row replaces a random one, the rest comes out shuffled. size 1 keeps the order."""
    held: list[T] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
        else:
            place = int(random.random() * size)
            held[place], row = row, held[place]
            yield row
    random.shuffle(held)
    yield from held
