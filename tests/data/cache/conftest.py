"""A folder of captioned pictures, and a place for their cache."""

import pytest
from helpers.cached import photos


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "photos")


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "cache")
