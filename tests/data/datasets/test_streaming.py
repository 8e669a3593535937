"""Streams: what each process reads, in which order, and how a run goes on where it stopped."""

from itertools import islice
from random import Random

import PIL.Image
import pytest
from helpers.loaders import FIXED, loader, samples
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.errors import InputError
from difftrain.data.datasets.streaming import shuffled_rows, through_buffer
from difftrain.data.items import Item, StreamDataset
from difftrain.data.opening import UnreadableImage


class Shards:
    """What the reading needs of a `datasets.IterableDataset`. Its rows are 0, 1, 2 ..."""

    def __init__(self, *sizes):
        self.shards = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
        self.num_shards = len(sizes)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return self.shards[index]


class Stream(StreamDataset):
    """A stream whose images are their row's number."""

    def __init__(self, *sizes, buffer=4, unreadable=()):
        self.source, self.buffer, self.unreadable = Shards(*sizes), buffer, set(unreadable)

    def is_labelled(self):
        return True

    def rows(self, seed, process_index, num_processes):
        return shuffled_rows(self.source, self.buffer, seed, process_index, num_processes)

    def item(self, key):
        if key in self.unreadable:
            raise UnreadableImage(f"row {key}", "truncated")
        return Item(PIL.Image.new("L", (6, 6), key), key, name=f"row {key}")


def read(count, stream, process=(0, 1), seed=0):
    return list(islice(stream.rows(seed, *process), count))


@given(count=st.integers(0, 40), size=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_buffer_gives_every_row_once(count, size, seed):
    assert sorted(through_buffer(range(count), size, Random(seed))) == list(range(count))


def test_a_buffer_of_one_keeps_the_order():
    assert list(through_buffer(range(20), 1, Random(0))) == list(range(20))


def test_no_row_comes_earlier_than_the_buffer_allows():
    found = list(through_buffer(range(100), 10, Random(0)))

    assert all(place >= row - 10 for place, row in enumerate(found))
    assert found != list(range(100))


def test_each_epoch_has_every_row_once_with_the_shards_in_another_order():
    found = read(60, Stream(5, 4, 6, 5, buffer=1))
    epochs = [found[:20], found[20:40], found[40:]]

    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    "process_count", [1, 2, 3, 4, 5]
)  # with 4 shards: whole shards for 1, 2 and 4, every n-th row for 3 and 5
def test_the_processes_share_an_epoch_without_overlap(process_count):
    size = 20 // process_count
    found = [
        row
        for p in range(process_count)
        for row in read(size, Stream(5, 5, 5, 5), (p, process_count))
    ]

    assert len(set(found)) == len(found) == size * process_count


def test_the_order_is_a_function_of_the_seed():
    assert read(40, Stream(10, 10)) == read(40, Stream(10, 10))
    assert read(40, Stream(10, 10)) != read(40, Stream(10, 10), seed=1)


def test_a_process_without_rows_is_an_error():
    with pytest.raises(InputError, match=r"no rows for process 2 of 3\. Use fewer processes"):
        read(1, Stream(2), (2, 3))


def test_a_stream_is_recognised():
    assert Stream(3).is_stream


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
def test_micro_batches_follow_the_rows_of_the_process(process, num_workers):
    found = samples(6, Stream(5, 4), process=process, transform=FIXED, num_workers=num_workers)

    assert [label for label, _ in found.values()] == read(12, Stream(5, 4), process, seed=5)
    assert all((pixels == label).all() for label, pixels in found.values())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("unreadable", [(), (2, 3, 7)])
def test_a_stream_goes_on_exactly_where_it_stopped(unreadable, num_workers):
    stream = Stream(5, 4, unreadable=unreadable)
    options = dict(process=(1, 2), on_error="skip", num_workers=num_workers)

    whole = {
        where: label for where, (label, _) in samples(9, stream, **options).items() if where[0] >= 4
    }
    found = {
        where: label for where, (label, _) in samples(5, stream, start_step=4, **options).items()
    }

    assert found == whole


def test_an_unreadable_row_is_replaced_by_the_next_which_keeps_its_own_turn():
    rows = read(20, Stream(9), seed=5)
    bad = rows[2]

    batches = list(
        islice(loader(Stream(9, unreadable=[bad]), on_error="skip", transform=FIXED).batches(0), 8)
    )

    expected = [rows[n + 1] if rows[n] == bad else rows[n] for n in range(16)]
    assert [int(label) for b in batches for label in b.labels] == expected
    expected_entry = {"data": "data", "name": f"row {bad}", "reason": "truncated", "digest": ""}
    assert batches[1].skipped == [{**expected_entry, "step": 1}]


def test_an_unreadable_row_stops_the_run_by_default():
    with pytest.raises(InputError, match=r"row 3 cannot be read: truncated\. Repair or remove it"):
        samples(9, Stream(9, unreadable=[3]))


def test_too_many_unreadable_rows_in_a_row_stop_a_run_that_skips():
    with pytest.raises(InputError, match="9 images in a row cannot be read"):
        samples(9, Stream(20, unreadable=range(20)), on_error="skip")
