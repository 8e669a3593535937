"""`datasets` as source: columns, tables and streams, and the message for each mistake."""

import os
from io import BytesIO
from itertools import islice

import datasets
import pytest
import torch
from helpers.places import ROOT
from helpers.reds import picture, red

from difftrain.core.errors import InputError
from difftrain.data.datasets.huggingface import HuggingFaceTable, huggingface
from difftrain.data.items import DATASETS, load_images
from difftrain.data.loader import Loader
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform

CIFAR10 = ROOT.parent / "shared/data/cifar10-10k/train.parquet"


def encoded(value):
    stored = BytesIO()
    picture(value).save(stored, "PNG")
    return stored.getvalue()


@pytest.fixture(autouse=True)
def quiet_and_apart(tmp_path, monkeypatch):
    """The cache of `datasets` below tmp_path, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def parquet(tmp_path):
    """parquet({"image": [...]}, features, files): the arguments that read `files` equal files."""

    def write(columns, features=None, files=1):
        table = datasets.Dataset.from_dict(
            columns, features=datasets.Features(features) if features else None
        )
        for n in range(files):
            table.to_parquet(tmp_path / f"part-{n}.parquet")
        return {"path": "parquet", "data_files": str(tmp_path / "part-*.parquet")}

    return write


STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
IMAGES = {
    "image feature": ([{"bytes": encoded(v), "path": None} for v in (0, 50)], datasets.Image()),
    "bytes": ([encoded(v) for v in (0, 50)], datasets.Value("binary")),
    "struct": ([{"bytes": encoded(v), "path": "x.png"} for v in (0, 50)], STRUCT),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_read_from_features_bytes_and_structs(parquet, kind, streaming):
    values, feature = IMAGES[kind]
    files = parquet(
        {"image": values, "other": [1, 2]}, {"image": feature, "other": datasets.Value("int8")}
    )

    source = huggingface(**files, streaming=streaming)
    items = (
        [source.item(row) for row in islice(source.rows(0, 0, 1), 2)]
        if streaming
        else [source[0], source[1]]
    )

    assert sorted(red(item.image) for item in items) == [0, 50]
    assert all((item.label, item.caption) == (None, None) for item in items)


def test_an_image_may_lie_at_a_path(parquet, save):
    files = [{"bytes": None, "path": str(save("a.png", 7))}, {"bytes": None, "path": "/none/b.png"}]
    table = huggingface(**parquet({"image": files}, {"image": STRUCT}))

    assert red(table[0].image) == 7
    with pytest.raises(
        UnreadableImage, match=r"row 1 \(/none/b.png\) cannot be read: .*No such file"
    ):
        table[1]


LABELS = {
    "class label": ([1, 0], datasets.ClassLabel(names=["dog", "cat"]), ["dog", "cat"], [1, 0]),
    "integers": ([4, 2], datasets.Value("uint8"), None, [4, 2]),
    "strings": (["dog", "cat"], datasets.Value("string"), ["cat", "dog"], [1, 0]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_class_labels_integers_or_names(parquet, kind):
    values, feature, names, ids = LABELS[kind]
    features = {"picture": datasets.Image(), "class": feature, "text": datasets.Value("string")}
    columns = {"picture": IMAGES["image feature"][0], "class": values, "text": ["one", "two"]}

    table = huggingface(
        **parquet(columns, features),
        image_column="picture",
        label_column="class",
        caption_column="text",
    )

    assert table.class_names == names
    assert [(table[i].label, table[i].caption, table[i].name) for i in (0, 1)] == [
        (ids[0], "one", "row 0"),
        (ids[1], "two", "row 1"),
    ]


def test_a_stream_takes_class_labels_and_no_names(parquet):
    images, feature = IMAGES["image feature"]
    source = parquet(
        {"image": images, "label": [1, 0], "kind": ["a", "b"]},
        {
            "image": feature,
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            "kind": datasets.Value("string"),
        },
    )

    stream = huggingface(**source, label_column="label", streaming=True)

    assert stream.is_stream
    assert stream.is_labelled()
    assert stream.class_names == ["dog", "cat"]
    assert {stream.item(row).label for row in islice(stream.rows(0, 0, 1), 2)} == {0, 1}
    with pytest.raises(
        InputError, match=r"label_column 'kind' holds strings.*Write streaming: false"
    ):
        huggingface(**source, label_column="kind", streaming=True)


def test_a_file_that_changes_and_keeps_its_time_is_read_again(parquet, tmp_path):
    """`datasets` goes by the time of modification alone."""
    given = parquet({"image": [encoded(10), encoded(20)]})
    file = tmp_path / "part-0.parquet"
    stat = file.stat()
    before = huggingface(**given)
    parquet({"image": [encoded(30), encoded(40)]})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert [red(huggingface(**given)[i].image) for i in range(2)] == [30, 40]
    assert [red(before[i].image) for i in range(2)] == [10, 20]  # who is reading goes on


def test_a_table_and_a_stream_are_no_confusion(parquet):
    source = parquet({"image": IMAGES["bytes"][0]})

    assert not huggingface(**source).is_stream


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_of_several_files_goes_on_where_it_stopped(parquet, num_workers):
    source = parquet({"image": [encoded(v) for v in range(5)], "label": list(range(5))}, files=4)
    stream = huggingface(**source, label_column="label", streaming=True, shuffle_buffer=3)

    def labels(start_step, count, process):
        loader = Loader(
            stream,
            Transform(4),
            seed=1,
            batch_size=4,
            micro_batch_size=2,
            process_index=process,
            num_processes=2,
            num_workers=num_workers,
        )
        return [b.labels.tolist() for b in islice(loader.batches(start_step), count)]

    epoch = [
        label
        for process in (0, 1)
        for labels_of_one in labels(0, 5, process)
        for label in labels_of_one
    ]
    assert sorted(epoch) == sorted(list(range(5)) * 4)
    assert labels(7, 4, 1) == labels(0, 11, 1)[7:]


def test_a_table_is_loaded_by_workers_as_by_itself(parquet):
    table = huggingface(**parquet({"image": [encoded(v) for v in range(9)]}))

    def pixels(num_workers):
        loader = Loader(
            table,
            Transform(4),
            seed=1,
            batch_size=2,
            micro_batch_size=2,
            process_index=0,
            num_processes=1,
            num_workers=num_workers,
        )
        return torch.cat([b.pixels for b in islice(loader.batches(0), 6)])

    assert torch.equal(pixels(2), pixels(0))


def test_damaged_bytes_are_named_by_their_row(parquet):
    table = huggingface(**parquet({"image": [encoded(0), encoded(0)[:45], None]}))

    with pytest.raises(UnreadableImage, match="row 1 cannot be read"):
        table[1]
    with pytest.raises(
        UnreadableImage, match="row 2 cannot be read: it has neither bytes nor a path"
    ):
        table[2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["image_column", "label_column", "caption_column"])
def test_a_missing_column_is_named_beside_those_that_are_there(parquet, key, streaming):
    source = parquet({"image": IMAGES["bytes"][0], "kind": ["a", "b"]})

    with pytest.raises(
        InputError, match=f"{key} 'nope' is not a column. Columns are: image, kind."
    ):
        huggingface(**source, **{key: "nope"}, streaming=streaming)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("image_column", r"column 'number' holds .*float64.*expected encoded images"),
        (
            "label_column",
            r"label_column 'number' holds float64, expected class labels, integers or strings",
        ),
        ("caption_column", r"caption_column 'number' holds .*float64.*expected strings"),
    ],
)
def test_a_column_of_another_type_is_an_error(parquet, key, message):
    with pytest.raises(InputError, match=message):
        huggingface(
            **parquet({"image": IMAGES["bytes"][0], "number": [0.5, 1.5]}), **{key: "number"}
        )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_files": "/none/x.parquet"}, "Unable to find '/none/x.parquet'"),
        ({"data_files": "/none/*.parquet"}, r"data_files '/none/\*.parquet'.*cannot be loaded"),
        ({"split": "test"}, "split 'test' cannot be loaded.*train"),
        ({"path": "/none", "data_files": None}, "path '/none'.*cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_gives_one_message(parquet, change, message, streaming):
    with pytest.raises(InputError, match=message):
        huggingface(**{**parquet({"image": IMAGES["bytes"][0]}), **change}, streaming=streaming)


def test_a_file_of_another_format_is_named(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")

    with pytest.raises(InputError, match=r"x\.parquet.*cannot be loaded"):
        huggingface("parquet", data_files=str(tmp_path / "x.parquet"))


def test_an_empty_label_or_caption_is_named(parquet):
    source = parquet({"image": IMAGES["bytes"][0], "kind": ["a", None], "number": [1, None]})

    with pytest.raises(InputError, match="label_column 'kind' is empty in some rows"):
        huggingface(**source, label_column="kind")
    with pytest.raises(InputError, match="row 1 is empty in column 'number'"):
        huggingface(**source, label_column="number")[1]
    with pytest.raises(InputError, match="row 1 is empty in column 'kind'"):
        huggingface(**source, caption_column="kind")[1]


def test_a_shuffle_buffer_without_a_stream_is_an_error(parquet):
    with pytest.raises(InputError, match="shuffle_buffer 10 has no effect without streaming: true"):
        huggingface(**parquet({"image": IMAGES["bytes"][0]}), shuffle_buffer=10)


def test_a_recipe_builds_it(parquet):
    block = {"type": "huggingface", **parquet({"image": IMAGES["bytes"][0]})}

    assert isinstance(DATASETS.parse(block, "data").build(), HuggingFaceTable)


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"needs {CIFAR10}")
def test_ten_thousand_photographs_of_cifar10():
    table = huggingface(
        "parquet", data_files=str(CIFAR10), label_column="label", caption_column="caption"
    )

    images = load_images(table, Transform(32, resize="none"), limit=50)

    assert len(table) == 10_000
    assert images.pixels.shape == (50, 3, 32, 32)
    assert table[0].caption == f"a photo of a {table.class_names[table[0].label]}"
