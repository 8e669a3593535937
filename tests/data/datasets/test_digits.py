"""The digits against scikit-learn's own reader, and their split."""

import hashlib
import tomllib
from importlib import resources

import numpy as np
import pytest
from helpers.places import ROOT
from sklearn.datasets import load_digits

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import PARTS, Digits
from difftrain.data.items import DATASETS


def test_pixels_and_labels_are_those_of_scikit_learn():
    digits, reference = Digits("all"), load_digits()

    assert len(digits) == 1797
    assert np.array_equal(digits.images, np.round(reference.images * 255 / 16))
    assert np.array_equal(digits.labels, reference.target)


def test_an_item_is_a_grey_image_with_its_label():
    item = Digits("train")[3]

    assert (item.image.mode, item.image.size) == ("L", (8, 8))
    assert item.label == Digits("train").labels[3]
    assert item.name == f"digit {Digits('train').rows[3]}"
    assert item.caption is None


def test_the_parts_are_disjoint_and_cover_everything():
    rows = np.concatenate([Digits(part).rows for part in PARTS])

    assert np.array_equal(np.sort(rows), np.arange(1797))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_fraction_of_every_class(part):
    whole, found = np.bincount(Digits("all").labels), np.bincount(Digits(part).labels)

    assert np.abs(found - PARTS[part] * whole).max() <= 1


def test_the_split_is_the_same_everywhere_and_always():
    fingerprint = hashlib.sha256(Digits("held_out").rows.astype("<i8").tobytes()).hexdigest()

    assert (
        fingerprint[:16] == "dd840fb55000df70"
    )  # changes with PARTS; results on the digits are then no longer comparable


def test_the_classes_are_the_ten_digits():
    assert DATASETS.parse("digits", "data").build().class_names == list("0123456789")


def test_an_unknown_part_is_an_error():
    with pytest.raises(
        InputError, match="expected 'train', 'classifier', 'held_out' or 'all', got 'test'"
    ):
        Digits("test")


def test_file_and_licences_are_part_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folder = resources.files("difftrain.data.datasets")

    shipped = project["tool"]["setuptools"]["package-data"]["difftrain.data.datasets"]
    assert set(shipped) == {"digits.csv.gz", "digits.LICENSE.txt"}
    assert all((folder / name).is_file() for name in shipped)
    licences = (folder / "digits.LICENSE.txt").read_text()
    assert "Alpaydin" in licences
    assert "CC BY 4.0" in licences
    assert "BSD 3-Clause License" in licences


def test_the_package_does_not_import_scikit_learn():
    assert not [
        file for file in (ROOT / "difftrain").rglob("*.py") if "sklearn" in file.read_text()
    ]
