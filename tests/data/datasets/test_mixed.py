"""Several data sets as one."""

from collections import Counter

import pytest
from helpers.reds import picture, red

from difftrain.core.errors import InputError
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.datasets.mixed import Mixed
from difftrain.data.items import DATASETS, Item, MapDataset, StreamDataset
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform


class Reds(MapDataset):
    """Images whose red channel is their number."""

    def __init__(self, first, num, label=None, caption=None, class_names=None):
        self.first, self.num, self.label, self.caption, self.class_names = (
            first,
            num,
            label,
            caption,
            class_names,
        )

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        if not 0 <= i < self.num:
            raise IndexError(i)
        return Item(
            picture(self.first + i, (4 + self.first, 3)),
            self.label,
            self.caption,
            f"red {self.first + i}",
        )


def test_sets_follow_each_other_and_count_as_often_as_stated():
    mixed = Mixed([Reds(0, 2), Reds(10, 3), Reds(20, 1)], repeats=[1, 2, 3])

    assert len(mixed) == 2 + 2 * 3 + 3
    assert [red(mixed[i].image) for i in range(len(mixed))] == [
        0,
        1,
        10,
        11,
        12,
        10,
        11,
        12,
        20,
        20,
        20,
    ]
    with pytest.raises(IndexError):
        mixed[11]


def test_an_epoch_has_each_image_as_often_as_its_set_repeats():
    mixed = Mixed([Reds(0, 2), Reds(10, 3)], repeats=[3, 1])
    loader = Loader(
        mixed,
        Transform(2),
        seed=0,
        batch_size=9,
        micro_batch_size=9,
        process_index=0,
        num_processes=1,
    )

    reds = next(loader.batches(0)).pixels[:, 0, 0, 0].tolist()

    assert Counter(reds) == {0: 3, 1: 3, 10: 1, 11: 1, 12: 1}


def test_sizes_captions_and_names_are_those_of_the_sets():
    mixed = Mixed([Reds(0, 1, caption="a"), Reds(6, 2, caption="b")], repeats=[2, 1])

    assert [mixed.size(i) for i in range(4)] == [(3, 4), (3, 4), (3, 10), (3, 10)]
    assert list(mixed.captions()) == [
        ("red 0", "a"),
        ("red 6", "b"),
    ]  # of a set that would have to be decoded, the first
    assert mixed.original(3).name == "red 7"


class Files(Reds):
    """Reds that answer some questions in their own way."""

    def size(self, i):
        return (100 + i, 200)

    def name_of(self, i):
        return f"file {i}"

    def weight(self, key):
        return 0.5 + key


def test_each_set_answers_for_its_own_images():
    mixed = Mixed([Files(0, 2), Reds(10, 1), Files(20, 3)], repeats=[2, 1, 1])

    assert [mixed.size(i) for i in (1, 3, 4, 7)] == [(101, 200), (101, 200), (3, 14), (102, 200)]
    assert [mixed.name_of(i) for i in (0, 3, 4, 6)] == ["file 0", "file 1", "row 0", "file 1"]
    assert [mixed.weight(i) for i in (0, 3, 4, 6)] == [0.5, 1.5, None, 1.5]


def test_a_recipe_nests_data_sets(save, tmp_path):
    save("one/a.png", 1)
    save("other/b.png", 2)
    sets = [{"type": "image_folder", "path": str(tmp_path / name)} for name in ("one", "other")]

    mixed = DATASETS.parse({"type": "mixed", "sets": sets, "repeats": [1, 2]}, "data").build()

    assert [red(mixed[i].image) for i in range(3)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("sets", "repeats", "message"),
    [
        ([], None, r"mixed: sets is empty"),
        ([Reds(0, 1)], [1, 2], r"mixed: 2 repeats for 1 sets.*repeats: \[1\]"),
        ([Reds(0, 1)], [0], r"repeats.0: expected greater than or equal to 1"),
        (
            [Reds(0, 1, 0, class_names=["cat"]), Reds(0, 1, 0, class_names=["dog"])],
            None,
            r"sets.1 has the classes dog, but sets.0 has the classes cat\. Write the same labels",
        ),
        (
            [Reds(0, 1, 0), Reds(0, 1)],
            None,
            r"sets.1 has no labels, but sets.0 has class ids without names",
        ),
        ([Reds(0, 1, caption="a"), Reds(0, 1)], None, r"sets.0 has captions, but sets.1 has none"),
        ([Reds(0, 1), Reds(0, 1, caption="a")], None, r"sets.1 has captions, but sets.0 has none"),
        ([Reds(0, 1), DigitClips()], None, r"sets.1 holds clips; only images can be mixed"),
    ],
)
def test_what_cannot_be_one_set_is_an_error(sets, repeats, message):
    with pytest.raises(InputError, match=message):
        Mixed(sets, repeats)


def test_a_stream_cannot_be_mixed(tmp_path):
    class Stream(StreamDataset):
        def is_labelled(self): ...

        def rows(self, seed, process_index, num_processes): ...

        def item(self, key): ...

    with pytest.raises(InputError, match=r"sets.0 is a stream.*streaming: false"):
        Mixed([Stream()])


def test_each_folder_says_what_it_leaves_out(save, tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"):
        save(name)
    for name in "ab":
        (tmp_path / name / "metadata.jsonl").write_text('{"file_name": "1.png", "caption": "one"}')
    sets = [ImageFolder(str(tmp_path / name), captions="metadata") for name in "ab"]

    assert Mixed(sets).left_out() == [
        ("sets.0: 2.png", "metadata.jsonl does not list it"),
        ("sets.1: 2.png", "metadata.jsonl does not list it"),
        ("sets.1: 3.png", "metadata.jsonl does not list it"),
    ]
