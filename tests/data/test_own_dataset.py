"""A data set of your own is one class: with captions, in buckets, mixed and from a cache."""

from itertools import islice

import PIL.Image
import pytest
import torch
from helpers.cached import Encoder, Words
from helpers.support import assert_close

from difftrain.core.rng import Rng
from difftrain.data.buckets import Buckets
from difftrain.data.cache import Cache, build_cache
from difftrain.data.captions import Captions
from difftrain.data.items import DATASETS, Item, MapDataset
from difftrain.data.loader import Loader
from difftrain.data.metadata import check_captions, some_captions
from difftrain.data.transform import Transform, to_unit_range

COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@DATASETS.register("flags_of_a_test")
class Flags(MapDataset):
    """Two stripes of different colors: all that somebody has to write for a new data set.

    Args:
        height: Height of the images.
    """

    def __init__(self, height: int = 12):
        self.height = height
        self.class_names = list(COLORS)
        self.pairs = [(above, below) for above in COLORS for below in COLORS if above != below]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Item:
        above, below = self.pairs[i]
        image = PIL.Image.new("RGB", (16, self.height), COLORS[below])
        image.paste(COLORS[above], (0, 0, 16, self.height // 2))
        label = list(COLORS).index(above)
        return Item(image, label, f"{above} above {below}", f"flag {i}")


TRANSFORM = Transform(8)


@pytest.fixture
def flags():
    return DATASETS.parse("flags_of_a_test", "data").build()


def batches(dataset, **options):
    settings = {
        "seed": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "process_index": 0,
        "num_processes": 1,
    }
    return list(islice(Loader(dataset, TRANSFORM, **settings, **options).batches(0), 8))


def test_it_answers_every_question_without_another_line(flags):
    assert (flags.items_are, flags.is_stream, flags.is_labelled()) == ("images", False, True)
    assert flags.is_captioned()
    assert list(flags.captions()) == [("flag 0", "red above green")]
    assert len(some_captions(flags)) == 6
    assert flags.size(2) == (12, 16)
    assert (flags.original(2).name, flags.original(2).label) == ("flag 2", 1)
    assert (flags.left_out(), flags.weight(0)) == ([], None)
    assert flags.name_of(2) == "row 2"
    check_captions(flags)


def test_it_is_mixed_with_others_by_a_recipe():
    block = {"type": "mixed", "sets": [{"type": "flags_of_a_test", "height": h} for h in (8, 12)]}

    mixed = DATASETS.parse(block, "data").build()

    assert [mixed.size(i) for i in (0, 6)] == [(8, 16), (12, 16)]
    assert mixed.class_names == ["red", "green", "blue"]


def test_its_latents_and_text_come_from_a_cache(flags, tmp_path):
    captions = Captions(templates=["a flag: {}"])
    encoder, text = Encoder(), Words()
    plan = Buckets(step=4).plan(flags, TRANSFORM, seed=1, batch_size=4)

    table = build_cache(
        flags, TRANSFORM, encoder, text, captions, Cache(str(tmp_path)), buckets=plan
    )
    found = batches(table, captions=captions, buckets=plan)

    assert (encoder.images, len(text.prompts)) == (6, 7)
    for cached, plain in zip(found, batches(flags, captions=captions, buckets=plan), strict=True):
        assert cached.labels.tolist() == plain.labels.tolist()
        assert torch.equal(cached.geometry, plain.geometry)
        expected = encoder.moments(to_unit_range(plain.pixels))
        assert_close(cached.moments, expected, absolute=1e-5)
        for name, states in text.encode(plain.captions).items():
            assert torch.equal(cached.cond[name], states)


def test_a_second_run_finds_its_images_by_their_content(flags, tmp_path):
    for _ in range(2):
        encoder, text = Encoder(), Words()
        table = build_cache(flags, TRANSFORM, encoder, text, Captions(), Cache(str(tmp_path)))

    assert (encoder.images, len(text.prompts)) == (0, 0)
    assert table.sample(0, Rng(0)).label == 0
