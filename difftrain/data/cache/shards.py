"""Tensors by key in safetensors files of one folder, written by any number of processes and runs.

A file holds entries of the same shapes, stacked; its keys stand in its header. It never changes. It
is written under another name and renamed, so it is complete; one that a disk has damaged is named,
removed and encoded again.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difftrain.core.console import wing_logger
from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.files import write_beside

logger = wing_logger(__name__)

Entry = dict[str, Tensor]
FORMAT = 1  # of everything in a cache; a cache of another format is not read
KEY = "key.json"
PATTERN = "[!.]*.safetensors"

# When a shard is written: all that an interruption may lose.
MOST_ENTRIES = 512
MOST_BYTES = 2**26
MOST_SECONDS = 60.0


class ShardFolder:
    """The entries of one kind that were made in the same way, in a folder of their own.

    Args:
        root: The folder of this kind of entries.
        key: What the entries depend on apart from their own keys, by name.
    """

    def __init__(self, root: Path, key: Mapping[str, str]):
        self.root = root
        self.key = dict(key)
        self.folder = root / digest(json.dumps(self.key, sort_keys=True))

    def create(self) -> bool:
        """Create the folder, and remove entries of another format from it.

        Returns:
            Whether there were any.

        Raises:
            InputError: If the folder cannot be written.
        """
        has_format = read_key(self.folder / KEY).get("format") == FORMAT
        others = [] if has_format else list(self.folder.glob(PATTERN))
        for file in others:
            file.unlink(missing_ok=True)
        with written(self.folder / KEY) as beside:
            content = {"format": FORMAT, **self.key}
            beside.write_text(json.dumps(content, sort_keys=True, indent=1))
        return bool(others)

    def scan(self) -> tuple[list[Path], dict[str, tuple[int, int]]]:
        """Find the entries. Damaged files are removed, with a message that names them.

        Returns:
            The files, and the (file, row) of every key.
        """
        files: list[Path] = []
        places: dict[str, tuple[int, int]] = {}
        for file in sorted(self.folder.glob(PATTERN)):
            keys = keys_in(file)
            if keys is None:
                logger.warning(
                    f"cache: {file} is damaged; it is removed, and its entries are encoded again"
                )
                file.unlink(missing_ok=True)
                continue
            for row, key in enumerate(keys):
                places[key] = (len(files), row)
            files.append(file)
        return files, places

    def write(self, keys: list[str], entries: list[Entry]) -> None:
        """Write entries of the same shapes as one file.

        Args:
            keys: Their keys.
            entries: The entries.

        Raises:
            InputError: If the file cannot be written.
        """
        tensors = {}
        for name in entries[0]:
            tensors[name] = torch.stack([entry[name] for entry in entries]).contiguous()
        with written(self.folder / f"{digest(*keys)}.safetensors") as beside:
            save_file(tensors, beside, metadata={"keys": " ".join(keys)})
            with beside.open("rb") as file:
                os.fsync(file.fileno())

    def differing(self) -> list[str]:
        """Return names of the key parts in which the most similar folder below `root` differs."""
        best: list[str] | None = None
        for file in self.root.glob(f"*/{KEY}"):
            if file.parent == self.folder:
                continue
            other = read_key(file)
            names = [name for name in self.key if other.get(name) != self.key[name]]
            if best is None or len(names) < len(best):
                best = names
        return best or []


def read_key(file: Path) -> dict[str, Any]:
    """Return the content of a key.json; empty if it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Write a file of the cache, whole or not at all.

    Args:
        path: Where the file is to be.

    Yields:
        A path to write to.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        with write_beside(path) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cache.folder: {path.parent} cannot be written ({error}). Make room, or write another "
            "folder."
        ) from error


def keys_in(file: Path) -> list[str] | None:
    """Return the keys of a file's entries; None if it is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            keys: str = shard.metadata()["keys"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return None
    return keys.split(" ")


class ShardWriter:
    """Collects entries, and writes those of the same shapes as a file.

    It writes as soon as there are enough of them, or a minute has passed.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: ShardFolder):
        self.folder = folder
        self.waiting: dict[str, list[tuple[str, Entry]]] = {}
        self.since = time.monotonic()
        self.bytes = 0

    def add(self, key: str, entry: Entry) -> None:
        """Add one entry under its key."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in sorted(entry.items())}
        of_shapes = self.waiting.setdefault(str(shapes), [])
        of_shapes.append((key, entry))
        self.bytes += sum(tensor.nbytes for tensor in entry.values())
        is_full = len(of_shapes) >= MOST_ENTRIES or self.bytes >= MOST_BYTES
        if is_full or time.monotonic() - self.since > MOST_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all entries that wait."""
        while self.waiting:
            _, entries = self.waiting.popitem()
            self.folder.write([key for key, _ in entries], [entry for _, entry in entries])
        self.since = time.monotonic()
        self.bytes = 0


class ShardReader:
    """Reads rows of files, which are mapped into memory.

    Each process opens a file for itself, when it first reads from it.

    Args:
        files: The files.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.process = os.getpid()
        self.opened: dict[int, Entry] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}

    def __call__(self, file: int, row: int) -> Entry:
        """Return one entry.

        Args:
            file: The number of its file.
            row: Its row in the file.

        Raises:
            InputError: If the file cannot be read any more.
        """
        if self.process != os.getpid():
            self.process = os.getpid()
            self.opened = {}
        if file not in self.opened:
            self.opened[file] = self._open(self.files[file])
        return {name: rows[row] for name, rows in self.opened[file].items()}

    def _open(self, file: Path) -> Entry:
        try:
            with safe_open(file, "pt") as shard:
                names = list(shard.keys())
                return {name: shard.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cache: {file} cannot be read any more ({error}). Run the same command again: it "
                "encodes again what is missing."
            ) from error
