"""One set of images under two names is found by its content, before anything is trained."""

import shutil

import pytest
from helpers.commands import pictures
from helpers.plans import SCORED, parquet, plans, rows_of

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.run.same_sets import SameSets

GREY = {"resolution": 8, "channels": 1, "resize": "none"}


@pytest.fixture
def sets(tmp_path):
    """A set of two classes, a copy of it under other names, and another set of as many pictures."""
    pictures(tmp_path / "a", num=12, classes=2)
    for i, file in enumerate(sorted((tmp_path / "a").rglob("*.png"), reverse=True)):
        place = tmp_path / "copy" / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place / f"other-{i}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    changed = tmp_path / "b" / "class0" / "000.png"
    shutil.copyfile(tmp_path / "a" / "class0" / "002.png", changed)
    return tmp_path


def folder(path) -> dict:
    return {"type": "image_folder", "path": str(path), "labels": "folders"}


def made(sets, **evaluation):
    """Plans of a run that trains on set a, in grey."""
    scored = {**SCORED, "num_samples": 12, "reference": folder(sets / "b"), **evaluation}
    return plans(sets / "recipe", data=folder(sets / "a"), transform=GREY, evaluation=scored)


@pytest.fixture(autouse=True)
def recipe_folder(tmp_path):
    (tmp_path / "recipe").mkdir()


def test_sets_are_compared_by_what_they_hold(sets):
    a, copy, b = (ImageFolder(str(sets / name)) for name in ("a", "copy", "b"))
    same = SameSets()

    assert same(a, copy)
    assert same(a, ImageFolder(str(sets / "b" / ".." / "a")))
    assert not same(a, b)
    assert not same(a, Digits("classifier"))
    assert same(Digits("all", classes=[3]), Digits("all", classes=[3]))


def test_sets_of_other_sizes_are_not_read(sets, monkeypatch):
    a, copy = (ImageFolder(str(sets / name)) for name in ("a", "copy"))
    del copy.files[0]
    monkeypatch.setattr("difftrain.data.images.Original.digest", None)

    assert not SameSets()(a, copy)


@pytest.mark.parametrize("name", ["b", "a/../b", "copy of b"])
def test_a_checkpoint_is_not_picked_on_the_images_of_the_final_score(sets, name):
    shutil.copytree(sets / "b", sets / "copy of b")
    loop = {
        "every": 1,
        "num_samples": 12,
        "reference": folder(sets / name),
        "metrics": ["frechet_distance"],
        "select": "frechet_distance",
    }

    with pytest.raises(InputError, match="would be picked on the images of the final score"):
        made(sets, in_loop=loop)
    assert made(sets, in_loop={**loop, "select": None}).scoring is not None
    assert made(sets, in_loop={**loop, "reference": folder(sets / "copy")}).scoring is not None


def test_a_reference_that_is_the_training_set_is_no_set_of_held_out_images(sets):
    for name in ("a", "copy"):
        scoring = made(sets, reference=folder(sets / name)).scoring
        assert scoring.compares_with_itself
        assert scoring.added_metrics() == []
        with pytest.raises(InputError, match="reference holds the training images"):
            made(sets, reference=folder(sets / name), metrics=["nearest_neighbour_ratio"])
    assert not made(sets).scoring.compares_with_itself
    assert len(made(sets).scoring.added_metrics()) == 1


@pytest.mark.parametrize(("learned", "where"), [("b", "of the reference"), ("copy", "trains on")])
def test_a_classifier_does_not_judge_what_it_was_trained_on(sets, learned, where):
    features = {"type": "classifier", "data": folder(sets / learned)}

    with pytest.raises(InputError, match=f"evaluation.features: the classifier is .*{where}"):
        made(sets, features=features)


def test_a_classifier_reads_no_stream(sets):
    stream = rows_of(parquet(sets / "rows.parquet"), label_column="label", streaming=True)

    with pytest.raises(InputError, match=r"its data is a stream\. Write streaming: false"):
        made(sets, features={"type": "classifier", "data": stream})
