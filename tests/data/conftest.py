"""Pictures on disk for the tests of data sets, and the messages of the wing."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.reds import picture


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save("cats/a.png", value): a picture below tmp_path whose red channel is the value."""

    def save(file: str, value: int = 0) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path, {".jfif": "JPEG"}.get(path.suffix.lower()))
        return path

    return save


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The messages, as they come."""
    found: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("difftrain"), Keeping()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)
