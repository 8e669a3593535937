"""The digits' classifier, trained once for all tests of this folder."""

import pytest

from difftrain.data.datasets.digits import Digits
from difftrain.data.items import Images, load_images
from difftrain.data.transform import Transform
from difftrain.evaluation.features.classifier import DigitsClassifier

AS_THEY_ARE = Transform(8, channels=1, resize="none")


@pytest.fixture(scope="session")
def classifier() -> DigitsClassifier:
    return DigitsClassifier(seed=0)


@pytest.fixture(scope="session")
def train() -> Images:
    return load_images(Digits("train"), AS_THEY_ARE)


@pytest.fixture(scope="session")
def held_out() -> Images:
    return load_images(Digits("held_out"), AS_THEY_ARE)
