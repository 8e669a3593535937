"""Pictures on disk for the tests of data sets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest


def picture(value: int = 0, size: tuple[int, int] = (6, 4)) -> PIL.Image.Image:
    """An RGB image whose red channel says which it is."""
    return PIL.Image.new("RGB", size, (value, 10, 20))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save("cats/a.png", value): a picture below tmp_path whose red channel is the value."""

    def save(file: str, value: int = 0) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path, {".jfif": "JPEG"}.get(path.suffix.lower()))
        return path

    return save


def red(image: PIL.Image.Image) -> int:
    return int(np.asarray(image.convert("RGB"))[0, 0, 0])
