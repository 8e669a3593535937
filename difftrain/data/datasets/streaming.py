"""The order in which a stream is read: whole shards in a random order, then rows through a buffer.

Both orders are functions of (seed, epoch, process), so that reading again gives the same rows. They
do not use the shuffling of `datasets`, which differs between its versions.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import Any, TypeVar

from difftrain.core.errors import InputError
from difftrain.core.rng import key

T = TypeVar("T")


def shuffled_rows(
    source: Any, buffer: int, seed: int, process_index: int, num_processes: int
) -> Iterator[Any]:
    """Yield the rows of this process's share without end; each epoch has each of them once.

    Args:
        source: A `datasets.IterableDataset`.
        buffer: Rows that are held for shuffling; 1 keeps the order within shards.
        seed: The seed of the orders.
        process_index: The rank.
        num_processes: The world size.

    Raises:
        InputError: If there are no rows for this process.
    """
    for epoch in count():
        share = share_of_epoch(source, seed, epoch, process_index, num_processes)
        random = Random(key(seed, epoch, process_index, "stream order"))
        is_empty = True
        for row in through_buffer(share, buffer, random):
            is_empty = False
            yield row
        if is_empty:
            raise InputError(
                f"data: the stream has no rows for process {process_index} of {num_processes}. "
                "Use fewer processes, or write streaming: false."
            )


def share_of_epoch(
    source: Any, seed: int, epoch: int, process_index: int, num_processes: int
) -> Iterator[Any]:
    """Yield this process's rows of one epoch.

    These are every num_processes-th shard where all processes then get equally many, and else every
    num_processes-th row of all shards.

    Args:
        source: A `datasets.IterableDataset`.
        seed: The seed of the order of shards.
        epoch: The number of the epoch.
        process_index: The rank.
        num_processes: The world size.
    """
    order = list(range(source.num_shards))
    Random(key(seed, epoch, 0, "shard order")).shuffle(order)
    if len(order) % num_processes == 0:
        return rows_of(source, order, order[process_index::num_processes])
    return islice(rows_of(source, order, order), process_index, None, num_processes)


def rows_of(source: Any, order: list[int], shards: list[int]) -> Iterator[Any]:
    """Yield the rows of some shards, in turn.

    Args:
        source: A `datasets.IterableDataset`.
        order: All shards.
        shards: Those that are read.
    """
    for shard in shards:
        yield from source.shard(num_shards=len(order), index=shard)


def through_buffer(rows: Iterable[T], size: int, random: Random) -> Iterator[T]:
    """Yield each row once, in an order that is random within the reach of a buffer.

    The buffer is filled first. Then each row replaces a random one, which is yielded. What is left
    at the end comes out shuffled.

    Args:
        rows: The rows.
        size: Rows in the buffer; 1 keeps the order.
        random: Where random numbers come from.
    """
    held: list[T] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
        else:
            place = int(random.random() * size)
            replaced = held[place]
            held[place] = row
            yield replaced
    random.shuffle(held)
    yield from held
