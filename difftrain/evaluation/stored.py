"""What a store holds, and how room is made in it. Nothing is removed unless somebody asks.

A store has folders of feature rows, one a key (`store.py`), classifiers that were trained for their
features, and digests of files. All of it can be made again.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftrain.core.files import DIGESTS

KEY = "key.json"  # in each folder of rows; its time is that of the last use
NAME = "made_as"  # in this file: what the rows were of, when they were made first
FEATURES, CLASSIFIERS = "features", "classifiers"  # within a store, beside the digests


@dataclass(frozen=True)
class Stored:
    """One thing in a store that is removed as a whole.

    Args:
        path: Its folder or file.
        what: What it is, in a word or two.
        made_with: The feature extractor behind it, by name; empty if there is none.
        count: The samples in it; None where nothing is counted.
        num_bytes: Its size.
        used: When it was last used, in seconds since 1970.
    """

    path: Path
    what: str
    made_with: str
    count: int | None
    num_bytes: int
    used: float

    def remove(self) -> None:
        """Delete it. Whoever is reading it can go on; whoever fills it begins again."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def contents(root: Path) -> list[Stored]:
    """List what a store holds, the longest unused first.

    Args:
        root: The folder of the store.
    """
    found = [*feature_sets(root / FEATURES), *classifiers(root / CLASSIFIERS)]
    notes = files_in(root / DIGESTS)
    if notes:
        used = max(file.stat().st_mtime for file in notes)
        found.append(Stored(root / DIGESTS, "digests of files", "", None, size(notes), used))
    return sorted(found, key=lambda stored: stored.used)


def feature_sets(folder: Path) -> Iterator[Stored]:
    """Yield the folders of feature rows."""
    for key_file in sorted(folder.glob(f"*/{KEY}")):
        own = key_file.parent
        what, made_with, count, used = "rows", "", None, 0.0
        # Else it was removed a moment ago, or is damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            used = key_file.stat().st_mtime
            described = json.loads(key_file.read_text())
            what, count = str(described[NAME]), int(described["num"])
            made_with = extractor_of(described)
        yield Stored(own, what, made_with, count, size(files_in(own)), used)


def extractor_of(described: dict[str, Any]) -> str:
    """Return the name of the extractor in a key; empty without one."""
    return str(described["key"].get("features", {}).get("type", ""))


def classifiers(folder: Path) -> Iterator[Stored]:
    """Yield the trained classifiers."""
    for file in files_in(folder):
        stat = file.stat()
        used = max(stat.st_mtime, stat.st_atime)
        yield Stored(file, "classifier", "", None, stat.st_size, used)


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder; none if it is not there."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


def size(files: Sequence[Path]) -> int:
    """Return the bytes of some files, of those that are still there."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError:  # removed a moment ago
            continue
    return total


def unwanted(found: Sequence[Stored], before: float | None, keep: int | None) -> list[Stored]:
    """Choose what is to be removed.

    Args:
        found: What a store holds, the longest unused first.
        before: What was last used before this time goes; None keeps it.
        keep: The bytes that may stay; the longest unused goes first. None sets no limit.
    """
    chosen = [stored for stored in found if before is not None and stored.used < before]
    rest = [stored for stored in found if stored not in chosen]
    total = sum(stored.num_bytes for stored in rest)
    for stored in rest:
        if keep is None or total <= keep:
            break
        chosen.append(stored)
        total -= stored.num_bytes
    return chosen
