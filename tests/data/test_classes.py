"""Class ids: those of the model, by name where both name their classes."""

import json
import shutil

import pytest
from helpers.commands import command, pictures, refused
from helpers.runs import tiny

from difftrain.core.errors import InputError
from difftrain.data.classes import class_id, with_classes_of
from difftrain.data.datasets.image_folder import ImageFolder

NAMES = ["ant", "bee", "cat"]


def named(folder, names):
    """Four pictures in a folder for each class."""
    for number, name in enumerate(names):
        pictures(folder / name, num=4 + number)
    return folder


def opened(folder, labels="folders"):
    return ImageFolder(str(folder), labels=labels)


def test_fewer_classes_are_mapped_by_name(tmp_path):
    whole = opened(named(tmp_path / "few", ["bee", "cat"]))
    assert (whole[0].label, whole.label_counts()) == (0, {0: 4, 1: 5})

    found = with_classes_of(whole, NAMES, 3, "validation.data")

    assert found.class_names == NAMES
    assert found.label_counts() == {1: 4, 2: 5}
    assert [found[i].label for i in (0, 4)] == [1, 2]
    assert [found.original(i).label for i in (0, 4)] == [1, 2]
    assert (len(found), found.name_of(4), found.is_labelled()) == (9, "cat/000.png", True)


def test_the_same_classes_are_the_data_set_itself(tmp_path):
    whole = opened(named(tmp_path / "all", NAMES))

    assert with_classes_of(whole, NAMES, 3, "data") is whole


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path):
    whole = opened(named(tmp_path / "other", ["bee", "cow"]))

    with pytest.raises(
        InputError, match=r"validation.data: it holds the class 'cow', but .* classes ant, bee, cat"
    ):
        with_classes_of(whole, NAMES, 3, "validation.data")


def recipe(tmp_path, **changes):
    """A recipe of three classes."""
    data = named(tmp_path / "photos", NAMES)
    blocks = {
        "data": {"type": "image_folder", "path": str(data), "labels": "folders"},
        "transform": {"resolution": 8, "channels": 1, "resize": "none"},
        "training__steps": 2,
        **changes,
    }
    return tiny(tmp_path, **blocks)


def in_metadata(folder, labels):
    pictures(folder, num=len(labels))
    lines = [{"file_name": f"{i:03d}.png", "label": label} for i, label in enumerate(labels)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"type": "image_folder", "path": str(folder), "labels": "metadata"}


def test_validation_measures_the_classes_that_its_folders_name(tmp_path):
    """A subset of the classes gives the same losses as the same pictures among all folders."""
    losses = []
    for run, drop in (("a", True), ("b", False)):
        place = tmp_path / run
        file = recipe(place)
        held_out = named(place / "held_out", ["bee", "cat"])
        data = {"type": "image_folder", "path": str(held_out), "labels": "folders"}
        if not drop:
            lines = [
                {"file_name": f"{name}/{i:03d}.png", "label": NAMES.index(name)}
                for name, num in (("bee", 4), ("cat", 5))
                for i in range(num)
            ]
            (held_out / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
            data["labels"] = "metadata"
        validation = json.dumps({"data": data, "every": 2, "num": 9})
        command("train", file, f"validation={validation}")
        losses.append((place / "run" / "validation.jsonl").read_text())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("verb", ["check", "train"])
def test_wrong_labels_are_refused_before_anything_is_trained(tmp_path, verb):
    data = in_metadata(tmp_path / "wrong", [0, 1, 2, 40])
    given = [verb, recipe(tmp_path, model__config__num_class_embeds=4)]

    message = refused(*given, f"data={json.dumps(data)}")
    assert "data: the data holds the class id 40, but the model has 3 classes" in message
    validation = json.dumps({"data": data, "every": 1})
    message = refused(*given, f"validation={validation}")
    assert "validation.data: the data holds the class id 40" in message
    shutil.move(tmp_path / "photos" / "ant", tmp_path / "photos" / "ape")
    other = named(tmp_path / "held_out", NAMES)
    block = {"type": "image_folder", "path": str(other), "labels": "folders"}
    message = refused(*given, f"validation={json.dumps({'data': block, 'every': 1})}")
    assert "validation.data: it holds the class 'ant', but" in message
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("label", [2**64, -1, True, 2**31])
def test_what_is_no_class_id_is_refused_with_its_line(tmp_path, label):
    block = in_metadata(tmp_path / "wrong", [0, label])

    with pytest.raises(InputError, match=r"metadata.jsonl:2: label"):
        ImageFolder(block["path"], labels="metadata")
    with pytest.raises(InputError, match=r"row 3: label .* is no class id"):
        class_id(label, "row 3")
