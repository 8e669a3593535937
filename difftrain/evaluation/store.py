"""Feature rows in folders that are only ever filled: one folder a key, one file a block.

A key says all that the rows depend on, so whoever has the same key can use the rows: another run,
another process, another command at the same time. Nothing is locked. A block is written beside its
place and renamed, with a digest of what it holds; two who make the same block write the same bytes.
Who finds a block missing or wrong makes it.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.files import write_beside, write_text
from difftrain.evaluation.rows import Rows, RowsInBlocks
from difftrain.evaluation.stored import KEY, NAME

FORMAT = 3  # of a block's file; it is part of every key
DIGEST = "xxh3"  # the metadata of a block's file: the digest of its rows
PATIENCE = 90.0  # seconds for which a block that must be there is looked for (NFS)
TRIES = 5  # writes of a block into a folder that somebody removes at the same time


class Column(NamedTuple):
    """The rows of one output.

    Args:
        width: Numbers in a row.
        dtype: Their type, by numpy's name.
    """

    width: int
    dtype: str = "float32"


class RowStore:
    """Rows of several columns by the index of their sample, in the folder of their key.

    Args:
        base: The folder that holds the folders of all keys.
        name: What the rows are of, for people; it does not count.
        key: Plain data that says all that the rows depend on.
        num: Rows of each column.
        block_size: Rows in a block; the last block may be shorter.
        columns: The columns by name.
        total: Rows of the whole set of which these are the first blocks; None: there are no more.
    """

    def __init__(
        self,
        base: Path,
        name: str,
        key: Mapping[str, Any],
        num: int,
        block_size: int,
        columns: Mapping[str, Column],
        total: int | None = None,
    ):
        self.columns = {column: columns[column] for column in sorted(columns)}
        self.num, self.block_size = num, block_size
        self.described = {
            "format": FORMAT,
            "key": dict(key),
            "num": num if total is None else total,
            "block_size": block_size,
            "columns": {column: list(about) for column, about in self.columns.items()},
        }
        self.name = name
        self.name_of_key = digest(json.dumps(self.described, sort_keys=True))
        self.folder = Path(base) / self.name_of_key

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return -(-self.num // self.block_size)

    def indices(self, block: int) -> list[int]:
        """Return the samples of a block."""
        return list(range(block * self.block_size, min((block + 1) * self.block_size, self.num)))

    def create(self) -> None:
        """Make the folder, if it is not there, and mark it as used now.

        Raises:
            InputError: If it cannot be written to.
        """
        file = self.folder / KEY
        if file.is_file():
            with contextlib.suppress(OSError):  # somebody else's store that is read alone
                os.utime(file)
            return
        try:
            write_text(file, json.dumps({NAME: self.name, **self.described}, indent=1))
        except OSError as error:
            raise InputError(
                f"{self.folder}: feature rows cannot be written there ({error.strerror}). Write "
                "another folder: evaluation.store, or DIFFTRAIN_CACHE."
            ) from error

    def check_visible(self) -> None:
        """Check that this process sees the folder, which the main process has made.

        Raises:
            InputError: If it does not see it within 90 seconds.
        """
        end = time.monotonic() + PATIENCE
        while not self.exists() and time.monotonic() < end:
            look_again(self.folder.parent)
        if not self.exists():
            raise InputError(
                f"{self.folder}: the main process made this folder, but this process does not see "
                "it. An evaluation on several machines needs a folder that all of them share."
            )

    def has(self, block: int) -> bool:
        """Return whether a block is there and holds what was written."""
        return self.is_there(block) and not self.problem(block)

    def is_there(self, block: int) -> bool:
        """Return whether a block has a file."""
        return self._file(block).is_file()

    def problem(self, block: int) -> str:
        """Return what is wrong with the file of a block; empty if it holds what was written."""
        try:
            with safe_open(self._file(block), "np") as opened:
                metadata = opened.metadata() or {}
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return f"it cannot be read ({error})"
        expected = {}
        for name, column in self.columns.items():
            expected[name] = ((len(self.indices(block)), column.width), np.dtype(column.dtype))
        found = {name: (value.shape, value.dtype) for name, value in values.items()}
        if found != expected:
            return "it holds other rows than its key says"
        if metadata.get(DIGEST) != self._digest(block, values):
            return "its rows are not those that were written (their digest differs)"
        return ""

    def write(self, block: int, rows: Mapping[str, Tensor]) -> None:
        """Write a block, whole or not at all.

        Args:
            block: The number of the block.
            rows: The rows [b, width] of every column.

        Raises:
            InputError: If it cannot be written.
        """
        count = len(self.indices(block))
        values = {}
        for name, column in self.columns.items():
            values[name] = np.ascontiguousarray(rows[name].numpy(), column.dtype)
            shape = values[name].shape
            assert shape == (count, column.width), (name, shape, count, column)
        # One entry, since several come in any order
        metadata = {DIGEST: self._digest(block, values)}
        for attempt in range(TRIES):
            try:
                with write_beside(self._file(block)) as beside:
                    save_file(values, beside, metadata)
                return
            except (OSError, SafetensorError) as error:
                # Whoever used the same rows may have removed the folder a moment ago.
                if attempt == TRIES - 1:
                    raise InputError(
                        f"{self.folder}: feature rows cannot be written there ({error}). Make "
                        "room, or write another folder: evaluation.store, or DIFFTRAIN_CACHE."
                    ) from error

    def absent(self) -> list[int]:
        """Return the blocks that do not appear within 90 seconds, although they must be there.

        Where somebody has removed the whole folder, it is not waited for.
        """
        end = time.monotonic() + PATIENCE
        while True:
            found = [block for block in range(self.num_blocks) if not self.is_there(block)]
            if not found or not self.exists() or time.monotonic() > end:
                return found
            look_again(self.folder)

    def exists(self) -> bool:
        """Return whether the folder is there."""
        return (self.folder / KEY).is_file()

    def rows(self) -> dict[str, Rows]:
        """Return every column, once all blocks are there.

        The files stay mapped, so rows can be read after somebody has removed them.

        Raises:
            FileNotFoundError: If a block has just been removed.
        """
        opened = [mapped(self._file(block)) for block in range(self.num_blocks)]
        found: dict[str, Rows] = {}
        for name, column in self.columns.items():
            parts = [block[name] for block in opened]
            found[name] = RowsInBlocks(parts, column.width, self.block_size)
        return found

    def remove(self) -> None:
        """Delete the folder with its rows. Rows that are open can still be read."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _digest(self, block: int, values: Mapping[str, np.ndarray]) -> str:
        """Return the digest of a block: of its rows, and of where they belong."""
        return rows_digest(f"{self.name_of_key}:{block}", values)

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:06d}.safetensors"


def rows_digest(place: str, values: Mapping[str, np.ndarray]) -> str:
    """Return the XXH3-128 of columns by name: names, types, shapes and values.

    Args:
        place: Where they belong; the same rows elsewhere have another digest.
        values: The columns.
    """
    state = xxhash.xxh3_128(place.encode())
    for name in sorted(values):
        value = values[name]
        state.update(f"{name}:{value.dtype}{list(value.shape)};".encode())
        state.update(value.data)
    return state.hexdigest()


def mapped(file: Path) -> dict[str, np.ndarray]:
    """Return the columns of a block, mapped into memory, by name.

    torch maps a file without keeping it open. A set has more blocks than a process may have open
    files, and numpy would open one for each column.

    Raises:
        FileNotFoundError: If the file has just been removed.
    """
    size = file.stat().st_size
    try:
        content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        if file.exists():
            raise
        raise FileNotFoundError(str(file)) from error
    length = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + length].tobytes())
    values = content[8 + length :]
    found: dict[str, np.ndarray] = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        found[name] = values[start:end].view(DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


DTYPES = {"F32": "float32", "F64": "float64", "I64": "int64", "U8": "uint8"}


def look_again(folder: Path) -> None:
    """Wait a moment, and make a network file system look at a folder again by listing it."""
    time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.listdir(folder)
