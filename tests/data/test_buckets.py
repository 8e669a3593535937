"""Buckets: which sizes there are, which images go where, and an order that leaves nothing out."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.errors import InputError
from difftrain.data.buckets import Bucket, BucketPlan, Buckets, assign
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.items import Item, MapDataset, StreamDataset
from difftrain.data.loader import Loader
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def plan_of(counts, batch_size=4, seed=0):
    """Buckets of so many items, dealt out in turn."""
    owners = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    sides = np.ones((len(owners), 2), dtype=int)
    buckets = [
        Bucket((8, 8 * (b + 1)), np.flatnonzero(owners == b), sides[owners == b])
        for b in range(len(counts))
    ]
    return BucketPlan(buckets, seed, batch_size)


def items_of(plan, step):
    bucket, places = plan.batch(step)
    return bucket.size, [int(bucket.items[places(position)]) for position in range(plan.batch_size)]


# Sizes


def test_the_sizes_of_a_resolution_are_the_common_ones():
    sizes = Buckets().sizes(512)

    assert sizes == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]


@given(st.integers(64, 1100), st.sampled_from([8, 32, 64]), st.floats(1, 4))
def test_every_size_is_allowed_and_cannot_grow(resolution, step, max_ratio):
    for height, width in Buckets(step=step, max_ratio=max_ratio).sizes(max(resolution, step)):
        assert height % step == width % step == 0
        assert height * width <= max(resolution, step) ** 2
        assert max(height, width) <= max_ratio * min(height, width)
        assert (min(height, width) + step) * max(height, width) > max(
            resolution, step
        ) ** 2 or height == width


@pytest.mark.parametrize(("resolution", "side"), [(512, 512), (511, 448), (500, 448), (108, 64)])
def test_there_is_always_a_square(resolution, side):
    assert (side, side) in Buckets(max_ratio=1.0).sizes(resolution)


def test_limits_of_the_sides_are_kept():
    assert Buckets(max_side=576).sizes(512) == [(576, 448), (512, 512), (448, 576)]
    assert Buckets(min_side=512).sizes(512) == [(512, 512)]


@pytest.mark.parametrize(
    ("settings", "resolution"),
    [({}, 32), ({"min_side": 640}, 512), ({"step": 100, "max_ratio": 1.0}, 99)],
)
def test_limits_that_leave_no_size_are_an_error(settings, resolution):
    with pytest.raises(
        InputError, match=r"buckets: no size of at most .* pixels has sides that are multiples of"
    ):
        Buckets(**settings).sizes(resolution)


def test_settings_are_checked():
    with pytest.raises(InputError, match=r"buckets.max_ratio: expected greater than or equal to 1"):
        Buckets(max_ratio=0.5)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20))
def test_an_image_goes_to_the_nearest_aspect(sides):
    sizes = Buckets(max_ratio=3.0).sizes(256)

    for (h, w), chosen in zip(sides, assign(np.array(sides), sizes), strict=True):
        distances = [abs(math.log(w / h) - math.log(width / height)) for height, width in sizes]
        assert distances[chosen] <= min(distances) + 1e-12


def test_of_sizes_of_the_same_aspect_the_largest_is_taken():
    assert assign(np.array([(10, 20)]), [(8, 16), (32, 64), (16, 32)]).tolist() == [1]


# Order


@given(COUNTS, st.integers(1, 7), st.integers(0, 3))
def test_items_of_a_bucket_are_visited_equally_often_after_any_number_of_steps(
    counts, batch_size, seed
):
    plan = plan_of(counts, batch_size, seed)
    visits, steps = Counter(), 60

    for step in range(steps):
        size, items = items_of(plan, step)
        assert all(item in plan.buckets[size[1] // 8 - 1].items for item in items)
        visits.update(items)

    for bucket in plan.buckets:
        of_bucket = [visits[int(item)] for item in bucket.items]
        assert max(of_bucket) - min(of_bucket) <= 1


@given(COUNTS, st.integers(1, 7), st.integers(1, 12))
def test_after_whole_epochs_every_bucket_is_less_than_a_batch_behind(counts, batch_size, epochs):
    plan = plan_of(counts, batch_size)
    steps = sum(epochs * count // batch_size for count in counts)

    batches = Counter(items_of(plan, step)[0][1] // 8 - 1 for step in range(steps))

    for b, count in enumerate(counts):
        assert 0 <= epochs * count - batches[b] * batch_size < batch_size


def test_a_bucket_smaller_than_a_batch_waits_until_it_fills_one():
    plan = plan_of([30, 1], batch_size=5)
    _, items = next(
        found for found in (items_of(plan, step) for step in range(40)) if found[0] == (8, 16)
    )

    assert len(set(items)) == 1  # its one image, as often as it is its turn in five epochs
    assert sum(items_of(plan, step)[0] == (8, 16) for step in range(31 * 5)) == 5


def test_the_order_of_buckets_differs_from_epoch_to_epoch_and_seed_to_seed():
    def order(seed, epoch):
        return [
            items_of(plan_of([40, 40], seed=seed), step)[0]
            for step in range(20 * epoch, 20 * epoch + 20)
        ]

    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


# With images


class Photos(MapDataset):
    """Images of stated sizes (height, width); the red channel is the index."""

    def __init__(self, sizes, unreadable=()):
        self.sizes, self.unreadable = sizes, unreadable

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        if i in self.unreadable:
            raise UnreadableImage(f"photo {i}", "truncated")
        return Item(PIL.Image.new("RGB", self.sizes[i][::-1], (i, 0, 0)), name=f"photo {i}")


SIZES = [(16, 16), (20, 30), (32, 16), (15, 33), (9, 9), (40, 20), (16, 17), (22, 11)]
BUCKETS = Buckets(step=4)
TRANSFORM = Transform(16)


def loaded(num, start=0, process=(0, 1), table=None, micro=2, **options):
    table = table or Photos(SIZES)
    plan = BUCKETS.plan(table, TRANSFORM, seed=3, batch_size=4)
    loader = Loader(
        table,
        TRANSFORM,
        seed=3,
        batch_size=4,
        micro_batch_size=micro,
        process_index=process[0],
        num_processes=process[1],
        buckets=plan,
        **options,
    )
    return list(islice(loader.batches(start), num))


def test_every_batch_has_one_size_and_its_images():
    plan = BUCKETS.plan(Photos(SIZES), TRANSFORM, seed=3, batch_size=4)

    for batch in loaded(20):
        size, items = items_of(plan, batch.step)
        assert batch.pixels.shape == (2, 3, *size)
        assert batch.pixels[:, 0, 0, 0].tolist() == [items[position] for position in batch.samples]
        assert batch.geometry[:, 4:].tolist() == [list(size)] * 2
        assert [tuple(g) for g in batch.geometry[:, :2].int().tolist()] == [
            SIZES[items[position]] for position in batch.samples
        ]
        assert all(plan.size_of(item) == size for item in items)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_from_any_step_and_on_any_number_of_processes_the_same_images_come(num_workers):
    whole = {(b.step, s): p for b in loaded(16) for s, p in zip(b.samples, b.pixels, strict=True)}
    tail = loaded(10, start=3, num_workers=num_workers)
    parts = loaded(8, process=(0, 2)) + loaded(8, process=(1, 2))

    for batch in tail + parts:
        for sample, pixels in zip(batch.samples, batch.pixels, strict=True):
            assert torch.equal(pixels, whole[batch.step, sample])


def test_an_unreadable_image_is_replaced_by_one_of_its_bucket():
    plan, skipped = BUCKETS.plan(Photos(SIZES), TRANSFORM, seed=3, batch_size=4), 0

    for batch in loaded(30, table=Photos(SIZES, unreadable=[0]), on_error="skip"):
        bucket, places = plan.batch(batch.step)
        following = {
            int(item): int(after)
            for item, after in zip(bucket.items, np.roll(bucket.items, -1), strict=True)
        }
        items = [int(bucket.items[places(position)]) for position in batch.samples]
        assert batch.pixels[:, 0, 0, 0].tolist() == [item or following[0] for item in items]
        assert batch.pixels.shape[2:] == bucket.size
        skipped += len(batch.skipped)

    assert skipped > 0


def test_the_table_says_what_goes_where():
    photos = Photos(
        [(16, 16), (9, 9), (8, 18), (32, 20)]
    )  # resized to 16 x 16, 16 x 16, 11 x 24 and 26 x 16

    table = Buckets(step=8, max_ratio=4.0).plan(photos, TRANSFORM, 0, 2).table()

    assert [line.split() for line in table.splitlines()] == [
        ["height", "x", "width", "images", "enlarged", "cropped", "away", "batches", "an", "epoch"],
        ["16", "x", "16", "3", "1", "12.8", "%", "1.50"],
        ["8", "x", "24", "1", "1", "27.3", "%", "0.50"],
        ["all", "4", "2", "2.00"],
    ]


def test_sizes_come_from_headers(tmp_path, monkeypatch):
    for i, (height, width) in enumerate(SIZES):
        PIL.Image.new("RGB", (width, height)).save(tmp_path / f"{i}.png")
    expected = BUCKETS.plan(Photos(SIZES), TRANSFORM, 0, 4).table()

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", refuse)

    assert BUCKETS.plan(ImageFolder(str(tmp_path)), TRANSFORM, 0, 4).table() == expected


def test_what_has_no_sizes_to_read_is_an_error():
    class Stream(StreamDataset):
        def is_labelled(self): ...

        def rows(self, seed, process_index, num_processes): ...

        def item(self, key): ...

    with pytest.raises(InputError, match=r"these are clips. Leave buckets out"):
        BUCKETS.plan(DigitClips(), TRANSFORM, 0, 4)
    with pytest.raises(InputError, match=r"these are a stream. Leave buckets out"):
        BUCKETS.plan(Stream(), TRANSFORM, 0, 4)
    with pytest.raises(InputError, match=r"transform.resize is none. Write resize: bicubic"):
        BUCKETS.plan(Photos(SIZES), Transform(16, resize="none"), 0, 4)


def test_the_loader_takes_no_plan_of_another_run():
    other = plan_of([8], seed=1)

    with pytest.raises(AssertionError, match="planned for another run"):
        Loader(
            Photos(SIZES),
            TRANSFORM,
            seed=0,
            batch_size=4,
            micro_batch_size=2,
            process_index=0,
            num_processes=1,
            buckets=other,
        )
