"""Data sets of tensors: unchanged by the loader, and an error where only images can be used."""

from itertools import islice

import pytest
import torch
from helpers.loaders import FIXED, loader
from helpers.reds import picture

from difftrain.core.errors import InputError
from difftrain.core.rng import permuted
from difftrain.data.buckets import Buckets
from difftrain.data.cache import Cache
from difftrain.data.captions import Captions
from difftrain.data.datasets.mixed import Mixed
from difftrain.data.items import Clip, Item, MapDataset, TensorItem, load_images
from difftrain.data.metadata import check_captions
from difftrain.data.transform import Transform


class Points(MapDataset):
    """Points of the plane, with a label, and a direction as conditioning."""

    item_shape = (2,)

    def __init__(self, num=7):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return TensorItem(
            torch.tensor([i, -i]) / 8, i % 3, {"way": torch.ones(4) * i}, f"point {i}"
        )


def first(dataset, **options):
    return next(loader(dataset, None, **options).batches(0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_values_labels_and_conditioning_are_those_of_the_items(num_workers):
    points = Points()

    batches = list(islice(loader(points, None, num_workers=num_workers).batches(0), 5))

    for batch in batches:
        items = [permuted(5, batch.step * 4 + position, 7) for position in batch.samples]
        assert torch.equal(batch.values, torch.stack([points[i].values for i in items]))
        assert torch.equal(batch.cond["way"], torch.stack([points[i].cond["way"] for i in items]))
        assert batch.labels.tolist() == [i % 3 for i in items]
        assert batch.names == [f"point {i}" for i in items]
        assert (batch.pixels, batch.captions, batch.geometry, batch.moments) == (None,) * 4


def test_values_keep_their_shape_and_precision():
    class Volumes(Points):
        item_shape = (2, 3, 4, 5)

        def __getitem__(self, i):
            return TensorItem(torch.full((2, 3, 4, 5), i, dtype=torch.float64))

    batch = first(Volumes())

    assert (batch.values.shape, batch.values.dtype) == ((2, 2, 3, 4, 5), torch.float64)
    assert (batch.labels, batch.cond) == (None, None)


def test_images_have_no_values():
    class Pictures(MapDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return Item(picture(i))

    assert next(loader(Pictures(), Transform(4)).batches(0)).values is None


def test_a_data_set_of_tensors_says_so():
    assert (Points().items_are, Points().is_labelled(), Points().is_captioned()) == (
        "tensors",
        True,
        False,
    )


def test_tensors_take_no_transform_and_images_need_one():
    with pytest.raises(AssertionError, match="need a transform"):
        loader(Points(), FIXED)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda points: Buckets().plan(points, None, 0, 4),
            r"buckets: .* these are tensors. Leave buckets out",
        ),
        (
            lambda points: Cache("nowhere").check(points, None, None, True, False),
            r"cache: tensors cannot be cached.* Leave cache out",
        ),
        (
            lambda points: load_images(points, FIXED),
            r"data: the data set yields tensors, but images",
        ),
        (lambda points: Mixed([points]), r"mixed: sets.0 holds tensors; only images can be mixed"),
        (lambda points: check_captions(points), r"point 0 has no caption"),
        (lambda points: first(points, captions=Captions()), r"point \d has no caption"),
    ],
)
def test_what_needs_images_takes_no_tensors(act, message):
    with pytest.raises(InputError, match=message):
        act(Points())


def returning(item, **attributes):
    """A data set of one kind of items."""

    class Returning(Points):
        def __getitem__(self, i):
            return item(i)

    for name, value in attributes.items():
        setattr(Returning, name, value)
    return Returning()


@pytest.mark.parametrize(
    ("dataset", "transform", "message"),
    [
        (
            returning(lambda i: TensorItem(torch.zeros(3), name="odd")),
            None,
            r"data: odd has the shape \(3,\), but the item_shape of the data set Returning is "
            r"\(2,\)",
        ),
        (
            returning(
                lambda i: TensorItem(torch.zeros(2), cond={"a": torch.zeros(i)}, name=f"point {i}")
            ),
            None,
            r"data: point \d has the conditioning tensors \{'a': \(\d,\)\}, but point \d has .* "
            r"same names and shapes",
        ),
        (
            returning(
                lambda i: TensorItem(torch.zeros(2), cond={"a": torch.zeros(1)} if i % 2 else None)
            ),
            None,
            r"data: an item has the conditioning tensors .*, but another one has",
        ),
        (
            returning(lambda i: Item(picture(), name="photo")),
            None,
            r"data: photo is of the kind images, but the data set Returning says that its items "
            r"are tensors.*item_shape",
        ),
        (
            returning(lambda i: TensorItem(torch.zeros(2)), item_shape=None),
            FIXED,
            r"data: an item is of the kind tensors, but the data set Returning says that its items "
            r"are images",
        ),
        (
            returning(lambda i: Clip([picture()]), item_shape=None),
            FIXED,
            r"data: an item is of the kind clips, but .* are images. A data set of clips sets "
            r"num_frames",
        ),
        (
            returning(lambda i: TensorItem(torch.zeros(2, dtype=torch.long), name="whole")),
            None,
            r"data: whole has values of type torch.int64, expected floating point. Write "
            r"values.float\(\)",
        ),
    ],
)
def test_items_that_are_not_what_the_data_set_says_are_named(dataset, transform, message):
    with pytest.raises(InputError, match=message):
        list(islice(loader(dataset, transform).batches(0), 4))
