"""Folders of images: files, order, labels and captions, and the message for each mistake."""

import json
import os

import PIL.features
import pytest
from helpers.reds import red

from difftrain.core.errors import InputError
from difftrain.data.datasets.image_folder import EXTENSIONS, ImageFolder
from difftrain.data.items import DATASETS
from difftrain.data.opening import UnreadableImage


def write_metadata(folder, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n")


def test_images_are_found_at_any_depth_with_any_case_of_extension_in_order(save, tmp_path):
    for value, name in enumerate(
        ["a.PNG", "b/c/d.JpEg", "b/e.webp", "b.bmp", "f.TIF", "g.jpg", "h.tiff"]
    ):
        save(name, value * 10)
    (tmp_path / "notes.txt").write_text("no image")

    folder = ImageFolder(str(tmp_path))

    assert folder.files == ["a.PNG", "b/c/d.JpEg", "b/e.webp", "b.bmp", "f.TIF", "g.jpg", "h.tiff"]
    assert [red(folder[i].image) for i in (0, 3, 4, 6)] == [
        0,
        30,
        40,
        60,
    ]  # those that are stored without loss
    assert (folder.class_names, folder[0].label, folder[0].caption) == (None, None, None)
    assert folder[1].name == str(tmp_path / "b/c/d.JpEg")


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_that_is_looked_for_can_be_read(save, tmp_path, extension):
    if extension == ".avif" and not PIL.features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    save(f"a{extension}")

    assert ImageFolder(str(tmp_path))[0].image.size == (6, 4)


def test_hidden_files_and_folders_are_left_out(save, tmp_path):
    for name in ("a.png", ".b.png", ".thumbnails/c.png", "d/._e.png"):
        save(name)

    assert ImageFolder(str(tmp_path)).files == ["a.png"]


def test_linked_folders_are_followed(save, tmp_path):
    save("elsewhere/cats/a.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "elsewhere/cats", tmp_path / "set/cats")

    assert ImageFolder(str(tmp_path / "set")).files == ["cats/a.png"]


def test_the_first_folder_level_is_the_class(save, tmp_path):
    for name in ("dogs/x.png", "cats/deep/er/y.png", "cats/z.png"):
        save(name)

    folder = ImageFolder(str(tmp_path), labels="folders")

    assert folder.class_names == ["cats", "dogs"]
    assert [(folder.files[i], folder[i].label) for i in range(3)] == [
        ("cats/deep/er/y.png", 0),
        ("cats/z.png", 0),
        ("dogs/x.png", 1),
    ]


def test_metadata_lists_the_images_with_labels_and_captions(save, tmp_path):
    for value, name in enumerate(["a.png", "b/c.png", "unlisted.png"]):
        save(name, value)
    write_metadata(
        tmp_path,
        {"file_name": "b/c.png", "label": "cat", "caption": "a cat"},
        "",
        {"file_name": "a.png", "label": "ant", "text": "an ant"},
    )

    folder = ImageFolder(str(tmp_path), labels="metadata", captions="metadata")

    assert folder.class_names == ["ant", "cat"]
    assert [(red(item.image), item.label, item.caption) for item in (folder[0], folder[1])] == [
        (0, 0, "an ant"),
        (1, 1, "a cat"),
    ]
    assert len(folder) == 2
    assert folder.left_out() == [("unlisted.png", "metadata.jsonl does not list it")]


def test_the_stamp_changes_with_a_file_and_nothing_else_does(save, tmp_path, monkeypatch):
    save("a.png")
    save("b/c.png")
    folder = ImageFolder(str(tmp_path))
    assert folder.original(0).stamp is None  # it was written just now
    monkeypatch.setattr("difftrain.core.file_digests.YOUNG", -1e9)
    before = folder.original(1).stamp

    assert ImageFolder(str(tmp_path)).original(1).stamp == before
    assert [folder.name_of(i) for i in range(2)] == ["a.png", "b/c.png"]
    os.utime(tmp_path / "b/c.png", ns=(1, 1))
    assert folder.original(1).stamp != before
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read: .*No such file"):
        folder.original(0)


def test_a_folder_without_metadata_leaves_nothing_out(save, tmp_path):
    save("a.png")

    assert ImageFolder(str(tmp_path)).left_out() == []


def test_metadata_may_name_its_files_by_another_way_and_of_another_extension(save, tmp_path):
    save("b/c.png")
    (tmp_path / "b/c.png").rename(tmp_path / "b/c.image")
    write_metadata(tmp_path, {"file_name": "./b/c.image", "label": 1})

    assert ImageFolder(str(tmp_path), labels="metadata").left_out() == []
    save("b/d.png")
    write_metadata(tmp_path, {"file_name": "./b/d.png", "label": 1})
    assert ImageFolder(str(tmp_path), labels="metadata").left_out() == [
        ("b/c.image", "ending .image is not read")
    ]


@pytest.mark.parametrize("again", ["a.png", "./a.png", "b/../a.png"])
def test_an_image_that_is_listed_twice_is_an_error_that_names_both_lines(save, tmp_path, again):
    save("a.png")
    save("b/c.png")
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "label": 0},
        {"file_name": "b/c.png", "label": 0},
        {"file_name": again, "label": 0},
    )

    with pytest.raises(InputError) as refusal:
        ImageFolder(str(tmp_path), labels="metadata")

    assert all(f"metadata.jsonl:{line}" in str(refusal.value) for line in (1, 3))
    assert (
        "Keep one of the lines. To count the whole set more often, write data: {type: mixed"
        in str(refusal.value)
    )


def test_integer_labels_of_metadata_are_ids_without_names(save, tmp_path):
    save("a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "label": 7})

    folder = ImageFolder(str(tmp_path), labels="metadata")

    assert (folder[0].label, folder.class_names) == (7, None)


def test_captions_of_metadata_go_with_labels_of_folders(save, tmp_path):
    save("cats/a.png")
    write_metadata(tmp_path, {"file_name": "cats/a.png", "text": "a cat"})

    item = ImageFolder(str(tmp_path), labels="folders", captions="metadata")[0]

    assert (item.label, item.caption) == (0, "a cat")


def test_captions_stand_in_text_files_beside_the_images(save, tmp_path):
    save("b/photo.png").with_suffix(".txt").write_text("  a bird \n", encoding="utf-8")

    assert ImageFolder(str(tmp_path), captions="sidecar")[0].caption == "a bird"


def test_a_byte_order_mark_is_no_part_of_a_caption(save, tmp_path):
    for name, text in {"a.png": "a cat\n", "b.png": "", "c.png": " \n"}.items():
        save(name).with_suffix(".txt").write_text(text, encoding="utf-8-sig")

    folder = ImageFolder(str(tmp_path), captions="sidecar")

    assert [folder[i].caption for i in range(3)] == ["a cat", "", ""]


def test_a_byte_order_mark_is_no_line_of_metadata(save, tmp_path):
    save("a.png")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "caption": "a cat"}', encoding="utf-8-sig")
    assert ImageFolder(str(tmp_path), captions="metadata")[0].caption == "a cat"

    metadata.write_text("\n", encoding="utf-8-sig")
    with pytest.raises(InputError, match=r"metadata\.jsonl has no lines"):
        ImageFolder(str(tmp_path), captions="metadata")


def test_a_damaged_image_is_found_when_it_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")

    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read"):
        ImageFolder(str(tmp_path))[0]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"path '.*/none' does not exist.*Write the folder that holds the images"
    ):
        ImageFolder(str(tmp_path / "none"))


def test_a_file_is_no_folder(save):
    with pytest.raises(InputError, match="is a file"):
        ImageFolder(str(save("a.png")))


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")

    with pytest.raises(
        InputError, match=r"no image below .* Expected files ending in .*\.jpg.*\.png"
    ):
        ImageFolder(str(tmp_path))


def test_an_image_outside_the_class_folders_is_named(save, tmp_path):
    save("cats/a.png")
    save("stray.png")

    with pytest.raises(InputError, match=r"stray\.png lies in no class folder"):
        ImageFolder(str(tmp_path), labels="folders")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"metadata\.jsonl:2: not JSON"),
        ('["a.png"]', r"metadata\.jsonl:2: no file_name"),
        (
            {"file_name": "gone.png", "label": 1},
            r"metadata\.jsonl:2: file_name 'gone\.png' is not a file below",
        ),
        (
            {"file_name": "b.png"},
            r"metadata\.jsonl:2: label None\. .* needs an integer or a class name",
        ),
        ({"file_name": "b.png", "label": True}, r"metadata\.jsonl:2: label True"),
        (
            {"file_name": "b.png", "label": "cat"},
            r"metadata\.jsonl:2: label 'cat', but .*metadata\.jsonl:1 has 0",
        ),
    ],
)
def test_a_wrong_line_of_metadata_is_named(save, tmp_path, line, message):
    save("a.png")
    save("b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "label": 0}, line)

    with pytest.raises(InputError, match=message):
        ImageFolder(str(tmp_path), labels="metadata")


def test_a_line_without_a_caption_is_named(save, tmp_path):
    save("a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "label": 0})

    with pytest.raises(
        InputError, match=r"metadata\.jsonl:1: caption None.*string at caption or text"
    ):
        ImageFolder(str(tmp_path), captions="metadata")


@pytest.mark.parametrize(("lines", "message"), [(None, "does not exist"), ([""], "has no lines")])
def test_missing_or_empty_metadata_shows_a_line(save, tmp_path, lines, message):
    save("a.png")
    if lines:
        write_metadata(tmp_path, *lines)

    with pytest.raises(InputError, match=f'{message}.*"file_name": "a/photo.png"'):
        ImageFolder(str(tmp_path), labels="metadata")


def test_missing_caption_files_are_counted_and_the_first_named(save, tmp_path):
    save("a.png").with_suffix(".txt").write_text("a")
    save("b.png")

    with pytest.raises(
        InputError, match=r"1 of 2 images have no caption file; .*b\.png needs .*b\.txt"
    ):
        ImageFolder(str(tmp_path), captions="sidecar")


def test_a_caption_file_that_is_no_text_is_named(save, tmp_path):
    save("a.png").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(InputError, match=r"caption file .*a\.txt cannot be read.*UTF-8"):
        ImageFolder(str(tmp_path), captions="sidecar")[0]


def test_a_recipe_names_it():
    with pytest.raises(InputError, match=r"data\.lables: unknown key \(did you mean 'labels'"):
        DATASETS.parse({"type": "image_folder", "path": "x", "lables": "folders"}, "data")
