"""Columns of rows by sample, in files of one folder, which the processes fill block by block.

A stopped evaluation finds again what it had written: a block counts once its rows are on the
disk. All processes must see the folder.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import write_text
from difftrain.core.processes import barrier, is_main, on_main
from difftrain.evaluation.agreement import together
from difftrain.evaluation.rows import Rows, RowsInFile

logger = wing_logger(__name__)

FORMAT = 1  # of the folder; rows of other formats are computed again
KEY, DONE, PROBLEM = "key.json", "done", "problem"


class Column(NamedTuple):
    """The rows of one output.

    Args:
        width: Numbers in a row.
        dtype: Their type, by numpy's name.
    """

    width: int
    dtype: str = "float32"

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.width * np.dtype(self.dtype).itemsize


class RowStore:
    """Rows of several columns in a folder. Collective: every process constructs it.

    Rows of another key, or of another format, in the folder are deleted.

    Args:
        folder: The folder, of which nothing else makes use.
        key: Plain data that says what the rows are of.
        num: Rows of each column.
        block_size: Rows in a block; the last block may be shorter.
        columns: The columns by name.

    Raises:
        InputError: If the folder cannot be written to, or if this process does not see it.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        num: int,
        block_size: int,
        columns: Mapping[str, Column],
    ):
        self.folder, self.columns = Path(folder), dict(columns)
        self.num, self.block_size = num, block_size
        described = {
            "format": FORMAT,
            "key": key,
            "num": num,
            "block_size": block_size,
            "columns": {name: list(column) for name, column in sorted(columns.items())},
        }
        on_main(lambda: self._prepare(json.dumps(described, sort_keys=True, indent=1)))
        together(self._check_visible)

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return -(-self.num // self.block_size)

    def indices(self, block: int) -> list[int]:
        """Return the samples of a block."""
        return list(range(block * self.block_size, min((block + 1) * self.block_size, self.num)))

    def missing(self) -> list[int]:
        """Return the blocks whose rows are not there, in order."""
        done = (self.folder / DONE).read_bytes()
        return [block for block, is_done in enumerate(done) if not is_done]

    def write(self, block: int, rows: Mapping[str, Tensor]) -> None:
        """Write a block. Its rows are on the disk before it counts.

        Args:
            block: The number of the block.
            rows: The rows [b, width] of every column.
        """
        start, count = block * self.block_size, len(self.indices(block))
        for name, column in self.columns.items():
            values = np.ascontiguousarray(rows[name].numpy(), column.dtype)
            assert values.shape == (count, column.width), (name, values.shape, count, column)
            write_at(self._file(name), start * column.row_bytes, values.tobytes())
        write_at(self.folder / DONE, block, b"\1")

    def rows(self) -> dict[str, Rows]:
        """Return every column, once no block is missing."""
        return {
            name: RowsInFile(self._file(name), column.width, column.dtype)
            for name, column in self.columns.items()
        }

    def report_problem(self) -> None:
        """Let the other processes know that this one has failed, so that they stop."""
        (self.folder / PROBLEM).touch()

    def has_problem(self) -> bool:
        """Return whether a process has failed."""
        return (self.folder / PROBLEM).exists()

    def remove(self) -> None:
        """Delete the folder. Collective."""
        barrier()
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check_visible(self) -> None:
        if not (self.folder / KEY).is_file():
            raise InputError(
                f"{self.folder}: the main process made this folder, but this process does not see "
                "it. An evaluation on several machines needs a folder that all of them share."
            )

    def _prepare(self, key: str) -> None:
        file = self.folder / KEY
        if file.is_file():
            if file.read_text() == key:
                (self.folder / PROBLEM).unlink(missing_ok=True)
                return
            if not has_format(file):
                logger.info(
                    f"{self.folder}: these feature rows have another format and are computed again"
                )
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            for name, column in self.columns.items():
                with self._file(name).open("wb") as rows:
                    rows.truncate(self.num * column.row_bytes)
            (self.folder / DONE).write_bytes(bytes(self.num_blocks))
            write_text(file, key)
        except OSError as error:
            raise InputError(
                f"{self.folder}: feature rows cannot be written there ({error.strerror}). Write "
                "another folder."
            ) from error

    def _file(self, column: str) -> Path:
        return self.folder / f"{column}.rows"


def has_format(key_file: Path) -> bool:
    """Return whether a key belongs to a folder of this format."""
    try:
        key = json.loads(key_file.read_text())
    except ValueError:
        return False
    return isinstance(key, dict) and key.get("format") == FORMAT


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes into an existing file, and wait until they are on the disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
