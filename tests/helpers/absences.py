"""Things that were there during training and are taken away afterwards."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OPTIMIZER = """
import torch


class Plain(torch.optim.SGD):
    '''SGD from a package of somebody's own.'''
"""


@contextlib.contextmanager
def without(*places: Path) -> Iterator[None]:
    """Take files and folders away within the context."""
    moved = {place: place.with_name(f"{place.name} taken away") for place in places}
    for place, away in moved.items():
        place.rename(away)
    try:
        yield
    finally:
        for place, away in moved.items():
            away.rename(place)


@contextlib.contextmanager
def optimizer_package(folder: Path, name: str) -> Iterator[str]:
    """Make the optimizer NAME.Plain importable within the context, and not any more behind it.

    Args:
        folder: Where the module is written.
        name: The name of the module, which no other test uses.

    Yields:
        What a recipe writes as `optimizer: {name: ...}`.
    """
    folder.mkdir()
    (folder / f"{name}.py").write_text(OPTIMIZER)
    sys.path.insert(0, str(folder))
    try:
        yield f"{name}.Plain"
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """Let accelerate find no tracker within the context, and Python no tensorboard."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("accelerate.tracking.get_available_trackers", lambda: [])
        for module in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
            patched.delitem(sys.modules, module)
        patched.setitem(sys.modules, "tensorboard", None)
        yield
