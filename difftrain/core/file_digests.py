"""Digests of files, remembered by what the file system says of a file.

A file is known again by its path, size, times and inode. Its time of change (ctime) is among them:
a program can set the time of modification back, and a file that takes another one's place can have
its size, but neither can set the time of change.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from difftrain.core.console import wing_logger
from difftrain.core.digests import digest
from difftrain.core.files import write_text

logger = wing_logger(__name__)

FORMAT = 1  # of the files that remember digests
YOUNG = 2.0  # seconds; within them a file can change again without a new time


def file_stamp(path: Path, stat: os.stat_result) -> str | None:
    """Return text that changes whenever the file does, quick to read.

    Args:
        path: The file.
        stat: What the file system says of it.

    Returns:
        The text; None for a file younger than two seconds, which can change without a trace.
    """
    if max(stat.st_mtime, stat.st_ctime) > time.time() - YOUNG:
        return None
    times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    return f"{path.absolute()}:{stat.st_size}:{times}:{stat.st_dev}:{stat.st_ino}"


class RememberedDigests:
    """Digests by stamp, which earlier runs and other processes wrote into a folder.

    Each process writes what it has found into a file of its own, so nothing is locked.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, str] = {}
        self.new: dict[str, str] = {}
        self._changes = threading.Lock()
        for file in notes_in(folder):
            # A damaged file, or one that another run has just removed: files are read again.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found = json.loads(file.read_text())
                if found["format"] == FORMAT:
                    self.known.update({k: as_hex(v) for k, v in found["digests"].items()})

    def __call__(self, stamp: str | None, compute: Callable[[], bytes]) -> bytes:
        """Return the digest of a file.

        Args:
            stamp: The file's stamp; None computes the digest in any case.
            compute: Computes the digest.
        """
        if stamp is None:
            return compute()
        mark = digest(stamp)
        if mark not in self.known:
            found = compute().hex()
            with self._changes:
                self.known[mark] = self.new[mark] = found
        return bytes.fromhex(self.known[mark])

    def save(self) -> None:
        """Write what is new into a file of this process.

        Raises:
            OSError: If the file cannot be written.
        """
        if not self.new:
            return
        text = json.dumps({"format": FORMAT, "digests": self.new}, sort_keys=True)
        write_text(self.folder / f"{digest(text)}.json", text)
        self.new = {}


def as_hex(text: str) -> str:
    """Return a digest that was read from a file.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is not hexadecimal.
    """
    return bytes.fromhex(text).hex()


def notes_in(folder: Path) -> Iterator[Path]:
    """Yield the complete files of remembered digests in a folder."""
    for file in sorted(folder.glob("*.json")):
        if not file.name.startswith("."):
            yield file


def remove_other_formats(folder: Path) -> None:
    """Remove files of remembered digests that have another format, with one message."""
    found = [file for file in notes_in(folder) if has_other_format(file)]
    if not found:
        return
    logger.info(
        f"{folder} holds digests in the format of another version of difftrain; the files are read "
        "again"
    )
    for file in found:
        file.unlink(missing_ok=True)


def has_other_format(file: Path) -> bool:
    """Return whether a file of remembered digests has another format; False if it is damaged."""
    try:
        content: Any = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return not isinstance(content, dict) or content.get("format") != FORMAT
