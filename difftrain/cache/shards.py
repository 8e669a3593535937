"""Tensors by key in safetensors files of one folder, written by any number of processes and runs, never changed.

A file holds entries of the same shapes, stacked; its keys stand in its header. It is written beside and renamed, so what is there is
whole; one that a disk has damaged is left out, named and made again.
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

from difftrain.registry import InputError
from difftrain.storage import digest, write_beside

Entry = dict[str, Tensor]
KEY, PATTERN = "key.json", "[!.]*.safetensors"
MOST_ENTRIES, MOST_BYTES, MOST_SECONDS = 512, 2**26, 60.0  # of a shard: what an interruption may lose


class ShardFolder:
    """The entries of one kind below `root` that were made with the same `key` (what of -> which), in a folder of their own."""

    def __init__(self, root: Path, key: Mapping[str, str]):
        self.root, self.key = root, dict(key)
        self.folder = root / digest(json.dumps(self.key, sort_keys=True))

    def create(self) -> None:
        with written(self.folder / KEY) as beside:
            beside.write_text(json.dumps(self.key, sort_keys=True, indent=1))

    def scan(self) -> tuple[list[Path], dict[str, tuple[int, int]]]:
        """The files, and the (file, row) of every key. Damaged files are removed, with a line that names them."""
        files, places = list[Path](), dict[str, tuple[int, int]]()
        for file in sorted(self.folder.glob(PATTERN)):
            keys = keys_in(file)
            if keys is None:
                print(f"cache: {file} is damaged; it is removed, and what it held is encoded anew", flush=True)
                file.unlink(missing_ok=True)
                continue
            places.update({key: (len(files), row) for row, key in enumerate(keys)})
            files.append(file)
        return files, places

    def write(self, keys: list[str], entries: list[Entry]) -> None:
        """Entries of the same shapes, as one file."""
        tensors = {name: torch.stack([entry[name] for entry in entries]).contiguous() for name in entries[0]}
        with written(self.folder / f"{digest(*keys)}.safetensors") as beside:
            save_file(tensors, beside, metadata={"keys": " ".join(keys)})
            with beside.open("rb") as file:
                os.fsync(file.fileno())

    def differing(self) -> list[str]:
        """What other entries in `root` were made with another one of; of several kinds the nearest. Empty: there are no others."""
        others = [json.loads(file.read_text()) for file in self.root.glob(f"*/{KEY}") if file.parent != self.folder]
        differences = [[name for name in self.key if other.get(name) != self.key[name]] for other in others]
        return min(differences, key=len, default=[])


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file of the cache, whole or not at all; what keeps it from being written is the user's to mend."""
    try:
        with write_beside(path) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise InputError(f"cache.folder: {path.parent} cannot be written ({error}). Make room, or write another folder.") from error


def keys_in(file: Path) -> list[str] | None:
    """The keys of a file's entries; None if it is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            return shard.metadata()["keys"].split(" ")
    except (SafetensorError, OSError, TypeError, KeyError):
        return None


class ShardWriter:
    """Collects entries, and writes a file of those of the same shapes when there are enough of them or a minute has passed."""

    def __init__(self, folder: ShardFolder):
        self.folder = folder
        self.waiting: dict[str, list[tuple[str, Entry]]] = {}
        self.since, self.bytes = time.monotonic(), 0

    def add(self, key: str, entry: Entry) -> None:
        shapes = str({name: (tensor.shape, tensor.dtype) for name, tensor in sorted(entry.items())})
        self.waiting.setdefault(shapes, []).append((key, entry))
        self.bytes += sum(tensor.nbytes for tensor in entry.values())
        most = max(len(entries) for entries in self.waiting.values())
        if most >= MOST_ENTRIES or self.bytes >= MOST_BYTES or time.monotonic() - self.since > MOST_SECONDS:
            self.flush()

    def flush(self) -> None:
        while self.waiting:
            _, entries = self.waiting.popitem()
            self.folder.write([key for key, _ in entries], [entry for _, entry in entries])
        self.since, self.bytes = time.monotonic(), 0


class ShardReader:
    """Rows of files, mapped into memory. Each process opens them for itself, when it first reads from them."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.process, self.opened = os.getpid(), dict[int, Entry]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}

    def __call__(self, file: int, row: int) -> Entry:
        if self.process != os.getpid():
            self.process, self.opened = os.getpid(), {}
        if file not in self.opened:
            self.opened[file] = self._open(self.files[file])
        return {name: rows[row] for name, rows in self.opened[file].items()}

    def _open(self, file: Path) -> Entry:
        try:
            with safe_open(file, "pt") as shard:
                return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise InputError(f"cache: {file} cannot be read any more ({error}). Run the same command again: what it held is encoded "
                             "anew.") from error
