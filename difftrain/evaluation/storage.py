"""Files that appear whole or not at all, and digests that say what is in them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Within: a path beside `path` to write to; it takes the place of `path` at the end, or vanishes with an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(*parts: Tensor | str | None) -> str:
    """16 hexadecimal digits of the SHA-256 of texts and of tensors' types, shapes and values, in this order."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{list(part.shape)}".encode())
            state.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            state.update(f"{part!r};".encode())
    return state.hexdigest()[:16]
