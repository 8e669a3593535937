"""Pictures on disk for the tests of data sets."""

from collections.abc import Callable
from pathlib import Path

import pytest
from reds import picture


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save("cats/a.png", value): a picture below tmp_path whose red channel is the value."""

    def save(file: str, value: int = 0) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path, {".jfif": "JPEG"}.get(path.suffix.lower()))
        return path

    return save
