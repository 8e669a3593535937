"""Micro-batches are the same for any number of workers and processes, and from any step."""

import contextlib
import multiprocessing
import subprocess
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.loaders import FIXED, RANDOM, loader, samples

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng, permuted
from difftrain.data.batch import Sample
from difftrain.data.captions import Captions
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.items import Item, MapDataset
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform


class Table(MapDataset):
    """Grey images of random pixels; label and caption are the index."""

    def __init__(self, size, unreadable=(), described=True):
        self.num, self.unreadable, self.described = size, set(unreadable), described

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        if i in self.unreadable:
            raise UnreadableImage(f"item {i}", "truncated")
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6), dtype=np.uint8)
        return Item(
            PIL.Image.fromarray(pixels),
            *((i, f"caption {i}") if self.described else ()),
            name=f"item {i}",
        )


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for where, (label, pixels) in expected.items():
        assert found[where][0] == label
        assert torch.equal(found[where][1], pixels)


def labels(count, table, **options):
    return [label for label, _ in samples(count, table, **options).values()]


def test_a_micro_batch_has_the_stated_shapes():
    first = next(loader(Table(7)).batches(0))

    assert (first.step, first.samples, first.skipped) == (0, [0, 1], [])
    assert (first.pixels.shape, first.pixels.dtype) == ((2, 1, 4, 4), torch.uint8)
    assert first.labels.dtype == torch.long
    assert first.captions == [f"caption {label}" for label in first.labels]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_micro_batch_of_clips_has_their_frames_and_labels(num_workers):
    clips = DigitClips(num_frames=3, size=12)

    first = next(
        loader(clips, Transform(12, channels=1, resize="none"), num_workers=num_workers).batches(0)
    )

    items = [clips[permuted(5, k, len(clips))] for k in (0, 1)]
    assert (first.pixels.shape, first.pixels.dtype) == ((2, 1, 3, 12, 12), torch.uint8)
    assert first.labels.tolist() == [item.label for item in items]
    for pixels, item in zip(first.pixels, items, strict=True):
        assert np.array_equal(pixels[0], np.stack([np.asarray(frame) for frame in item.frames]))


def test_without_labels_and_captions_there_are_none():
    first = next(loader(Table(7, described=False)).batches(0))

    assert (first.labels, first.captions) == (None, None)


@pytest.mark.parametrize("size", [3, 7, 8])  # smaller than a batch; no multiple of it; a multiple
def test_each_epoch_has_every_item_once_in_another_order(size):
    found = labels(4 * size, Table(size))
    epochs = [found[start : start + size] for start in range(0, 8 * size, size)]

    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_changes_nothing(num_workers):
    assert_same(samples(9, Table(7), num_workers=num_workers), samples(9, Table(7)))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_what_one_process_would_read(process_count):
    parts = [
        samples(12 // process_count, Table(7), process=(i, process_count), micro_batch_size=1)
        for i in range(process_count)
    ]

    together = {where: sample for part in parts for where, sample in part.items()}

    assert len(together) == 12
    assert_same(together, samples(6, Table(7)))


def test_the_size_of_micro_batches_changes_nothing():
    assert_same(samples(12, Table(7), micro_batch_size=1), samples(3, Table(7), micro_batch_size=4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_at_a_step_is_skipping_to_it(num_workers):
    expected = {where: sample for where, sample in samples(10, Table(7)).items() if where[0] >= 3}

    assert_same(samples(4, Table(7), start_step=3, num_workers=num_workers), expected)


def test_a_sample_depends_on_its_number_in_the_run_and_not_on_the_batch_size():
    pairs = zip(
        samples(6, Table(7)).values(),
        samples(3, Table(7), batch_size=12, micro_batch_size=4).values(),
        strict=True,
    )

    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)


def test_another_seed_gives_another_order_and_other_crops():
    assert labels(7, Table(14)) != labels(7, Table(14), seed=6)
    one, other = samples(14, Table(14)), samples(14, Table(14), seed=6)
    cropped = dict(other.values())
    assert any(
        not torch.equal(pixels, cropped[label])
        for label, pixels in one.values()
        if label in cropped
    )


def test_each_epoch_crops_an_item_differently():
    found = [pixels for label, pixels in samples(20, Table(2)).values() if label == 0]

    assert len({tuple(pixels.flatten().tolist()) for pixels in found}) > 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(num_workers):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    samples(3, Table(7), num_workers=num_workers)

    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_with_its_name_and_nothing_else(num_workers):
    with pytest.raises(InputError) as error:
        samples(4, Table(7, unreadable=[3]), num_workers=num_workers)

    remedy = "Repair or remove it, or write loader: {on_error: skip}."
    assert str(error.value) == f"item 3 cannot be read: truncated. {remedy}"


def test_workers_end_when_an_image_stops_the_run():
    with pytest.raises(InputError) as error:
        samples(4, Table(7, unreadable=[3]), num_workers=2)

    assert multiprocessing.active_children() == []
    assert error.traceback  # it holds the frames of the loader, and must not hold its workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_skipped_image_is_replaced_by_the_next_readable_one(num_workers):
    table = Table(7, unreadable=[3, 4, 6])
    stands_in = {3: 5, 4: 5, 6: 0}

    found = samples(7, table, transform=FIXED, on_error="skip", num_workers=num_workers)

    whole = samples(7, Table(7), transform=FIXED)
    assert [label for label, _ in found.values()] == [
        stands_in.get(label, label) for label, _ in whole.values()
    ]


def test_each_skipped_image_is_recorded_with_its_step():
    whole = {label: step for (step, _), (label, _) in samples(4, Table(8)).items()}

    found = [
        record
        for batch in islice(loader(Table(8, unreadable=[3]), on_error="skip").batches(0), 4)
        for record in batch.skipped
    ]

    expected = {"data": "data", "name": "item 3", "reason": "truncated", "digest": ""}
    assert found == [{**expected, "step": whole[3] + 1}]


def test_when_nothing_can_be_read_skipping_stops():
    with pytest.raises(
        InputError, match=r"3 images in a row cannot be read.*item . cannot be read: truncated"
    ):
        samples(1, Table(3, unreadable=range(3)), on_error="skip")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_too_small_image_is_an_error_and_not_skipped(num_workers):
    too_large = Transform(9, channels=1, resize="none")

    with pytest.raises(InputError, match=r"^item \d is 6x6, smaller than resolution 9"):
        samples(1, Table(7), transform=too_large, on_error="skip", num_workers=num_workers)


def both_workers_at_work():
    """Batches of two workers, after the first batch of each, so that both have started."""
    batches = loader(Table(7), num_workers=2).batches(0)
    assert [next(batches).step for _ in range(2)] == [0, 0]
    return batches


def test_workers_outlive_a_signal_that_everyone_gets_and_end_with_the_loader():
    batches = both_workers_at_work()
    workers = multiprocessing.active_children()
    for worker in workers:
        subprocess.run(
            ["kill", "-TERM", str(worker.pid)], check=True
        )  # not from this process, their main one
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)

    assert [b.step for b in islice(batches, 10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]

    batches.close()
    assert_ended(workers, 2)


def test_workers_left_over_can_be_ended_by_their_main_process():
    batches = both_workers_at_work()
    workers = multiprocessing.active_children()

    for worker in workers:  # what the interpreter does on its way out, and then waits
        worker.terminate()

    assert_ended(workers, 2)
    with contextlib.suppress(RuntimeError):  # torch: DataLoader worker exited unexpectedly
        batches.close()


def assert_ended(workers, count):
    assert len(workers) == count
    for worker in workers:
        worker.join()
        assert not worker.is_alive()


def test_sizes_that_do_not_divide_are_a_mistake_of_the_program():
    with pytest.raises(AssertionError, match="must divide"):
        loader(Table(7), batch_size=4, micro_batch_size=3)


# Captions, geometry, samples of a cache


def captions_shown(count, table, **options):
    return [
        text
        for batch in islice(loader(table, **options).batches(0), count)
        for text in batch.captions
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_captions_are_those_of_the_samples(num_workers):
    settings = Captions(dropout=0.5, templates=["a {}", "the {}"])

    found = captions_shown(7, Table(7), captions=settings, num_workers=num_workers)

    expected = [settings(f"caption {permuted(5, k, 7)}", Rng(5, samples=[k])) for k in range(14)]
    assert found == expected
    assert {text[:2] for text in found} == {"", "a ", "th"}


def test_processes_share_the_captions_of_one_process():
    settings = Captions(dropout=0.5, templates=["a {}", "the {}"])
    parts = [
        captions_shown(6, Table(7), captions=settings, process=(i, 2), micro_batch_size=2)
        for i in (0, 1)
    ]

    whole = captions_shown(12, Table(7), captions=settings)

    assert [
        text for step in range(6) for part in parts for text in part[2 * step : 2 * step + 2]
    ] == whole


def test_a_missing_caption_stops_with_the_images_name():
    with pytest.raises(InputError, match=r"item \d has no caption"):
        captions_shown(1, Table(7, described=False), captions=Captions())


def test_the_geometry_comes_along():
    first = next(loader(Table(7)).batches(0))
    table, transform = Table(7), RANDOM

    expected = [
        transform.place(table[permuted(5, k, 7)].image, Rng(5, samples=[k])).geometry
        for k in (0, 1)
    ]

    assert first.geometry.dtype == torch.float32
    assert first.geometry.tolist() == [list(map(float, geometry)) for geometry in expected]
    assert (
        next(
            loader(DigitClips(num_frames=3, size=12), Transform(12, 1, resize="none")).batches(0)
        ).geometry
        is None
    )


class Cached(Table):
    """Moments and states instead of pixels and captions."""

    def sample_source(self, transform, captions=None):
        return self

    def sample(self, key, rng, size=None):
        self[key]
        return Sample(
            label=key,
            moments=torch.full((2, 3, 3), float(key)),
            cond={"words": torch.full((4,), rng.samples[0])},
        )


def test_samples_that_a_data_set_makes_itself_are_stacked():
    first = next(loader(Cached(7)).batches(0))
    items = [permuted(5, k, 7) for k in (0, 1)]

    assert (first.pixels, first.captions, first.geometry) == (None, None, None)
    assert first.labels.tolist() == items
    assert torch.equal(
        first.moments, torch.tensor(items).float().reshape(2, 1, 1, 1).expand(2, 2, 3, 3)
    )
    assert first.cond["words"].tolist() == [[0] * 4, [1] * 4]


def test_unreadable_ones_among_them_are_replaced_too():
    found = [
        label
        for batch in islice(loader(Cached(7, unreadable=[3]), on_error="skip").batches(0), 4)
        for label in batch.labels
    ]

    assert len(found) == 8
    assert 3 not in found


class Weighted(Table):
    """Items of which only odd ones say what they count."""

    def weight(self, key):
        return 0.25 if key % 2 else None


def test_a_sample_without_a_weight_counts_once_beside_those_with_one():
    batch = next(loader(Weighted(8), batch_size=8, micro_batch_size=8).batches(0))

    assert sorted(batch.weights.tolist()) == [0.25] * 4 + [1.0] * 4
    assert (batch.weights == 0.25).tolist() == (batch.labels % 2 == 1).tolist()
    assert next(loader(Table(8)).batches(0)).weights is None
