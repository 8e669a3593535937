"""How often each class occurs, as decoding every item would tell, and every caption."""

import json
from collections import Counter

import PIL.Image
import pytest
from helpers.commands import pictures
from helpers.plans import parquet, rows_of

from difftrain.core.errors import InputError
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.huggingface import huggingface
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.datasets.mixed import Mixed
from difftrain.data.items import Item, MapDataset
from difftrain.data.metadata import every_caption
from difftrain.data.opening import UnreadableImage


def folder(place):
    return ImageFolder(str(pictures(place / "pictures", num=7, classes=3)), labels="folders")


def listed(place):
    root = pictures(place / "listed", num=3)
    labels = enumerate(["cat", "ant", "cat"])
    lines = [json.dumps({"file_name": f"{i:03d}.png", "label": label}) for i, label in labels]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return ImageFolder(str(root), labels="metadata")


def table(place):
    block = rows_of(parquet(place / "a.parquet", num=7), label_column="label")
    return huggingface(**{key: value for key, value in block.items() if key != "type"})


def mixed(place):
    return Mixed([Digits("train", classes=[3]), Digits("train", classes=[5])], repeats=[1, 4])


def unlabelled(place):
    return ImageFolder(str(pictures(place / "unlabelled", num=3)))


class Own(MapDataset):
    """A data set with no quicker way to its labels than its items, of which one is damaged."""

    def __init__(self, place):
        self.labels = [4, 2, None, 4]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if self.labels[i] is None:
            raise UnreadableImage(f"item {i}", "damaged")
        return Item(PIL.Image.new("L", (2, 2)), self.labels[i], f"caption {i}", f"item {i}")


def clips(place):
    return DigitClips("held_out", num_frames=2, size=9)


@pytest.mark.parametrize("make", [folder, listed, table, mixed, clips, unlabelled])
def test_labels_are_counted_as_decoding_every_item_would(tmp_path, make):
    dataset = make(tmp_path)
    decoded = [dataset[i].label for i in range(len(dataset))]

    expected = None if None in decoded else Counter(decoded)

    assert dataset.label_counts() == expected


def test_labels_are_counted_without_decoding_files(tmp_path):
    dataset = folder(tmp_path)
    for file in (tmp_path / "pictures").rglob("*.png"):
        file.write_bytes(b"damaged")

    assert dataset.label_counts() == {0: 3, 1: 2, 2: 2}


def test_an_item_that_cannot_be_read_does_not_count(tmp_path):
    assert Own(tmp_path).label_counts() == {4: 2, 2: 1}


def test_every_caption_is_read_also_where_images_must_be_decoded(tmp_path):
    own = Own(tmp_path)
    own.labels = [1, 1, 1]

    assert every_caption(own, "data") == ["caption 0", "caption 1", "caption 2"]


def test_a_missing_caption_is_named(tmp_path):
    with pytest.raises(InputError, match=r"000.png \(evaluation.reference\) has no caption"):
        every_caption(unlabelled(tmp_path), "evaluation.reference")
