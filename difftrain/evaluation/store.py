"""Columns of rows by image index in files of one folder, filled block by block by any number of processes.

What a stopped evaluation had written is found again: a block counts once its rows are on the disk. All processes must see the folder.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from difftrain.distributed import barrier, is_main, on_main
from difftrain.evaluation.rows import Rows, RowsInFile
from difftrain.registry import InputError

KEY, DONE, PROBLEM = "key.json", "done", "problem"


class Column(NamedTuple):
    width: int
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Of one row."""
        return self.width * np.dtype(self.dtype).itemsize


class RowStore:
    """`num` rows of each column in `folder`, in blocks of `block_size` indices. Collective: made on all processes.

    key: JSON-able; what the rows are of. Rows of another key in the folder are thrown away.
    """

    def __init__(self, folder: Path, key: dict[str, Any], num: int, block_size: int, columns: Mapping[str, Column]):
        self.folder, self.num, self.block_size, self.columns = Path(folder), num, block_size, dict(columns)
        described = {"key": key, "num": num, "block_size": block_size, "columns": {name: list(c) for name, c in sorted(columns.items())}}
        on_main(lambda: self._prepare(json.dumps(described, sort_keys=True, indent=1)))
        if not (self.folder / KEY).is_file():
            raise InputError(f"{self.folder} was made by the main process, but this one does not see it. An evaluation on several machines "
                             "needs a folder that all of them share.")

    def _prepare(self, key: str) -> None:
        file = self.folder / KEY
        if file.is_file() and file.read_text() == key:
            (self.folder / PROBLEM).unlink(missing_ok=True)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            for name, column in self.columns.items():
                with self._file(name).open("wb") as rows:
                    rows.truncate(self.num * column.bytes)
            (self.folder / DONE).write_bytes(bytes(self.num_blocks))
            beside = file.with_suffix(".new")
            beside.write_text(key)
            os.replace(beside, file)
        except OSError as error:
            raise InputError(f"{self.folder}: feature rows cannot be written there ({error.strerror}). Write another folder.") from error

    @property
    def num_blocks(self) -> int:
        return -(-self.num // self.block_size)

    def indices(self, block: int) -> list[int]:
        return list(range(block * self.block_size, min((block + 1) * self.block_size, self.num)))

    def missing(self) -> list[int]:
        """Blocks whose rows are not there, in order."""
        return [block for block, there in enumerate((self.folder / DONE).read_bytes()) if not there]

    def write(self, block: int, rows: Mapping[str, Tensor]) -> None:
        """The rows [b, width] of every column for the indices of this block; they are on the disk before it counts."""
        start, count = block * self.block_size, len(self.indices(block))
        for name, column in self.columns.items():
            values = np.ascontiguousarray(rows[name].numpy(), column.dtype)
            assert values.shape == (count, column.width), (name, values.shape, count, column)
            put(self._file(name), start * column.bytes, values.tobytes())
        put(self.folder / DONE, block, b"\1")

    def rows(self) -> dict[str, Rows]:
        """Every column, once no block is missing."""
        return {name: RowsInFile(self._file(name), column.width, column.dtype) for name, column in self.columns.items()}

    def tell_problem(self) -> None:
        """Let the other processes know that this one has met something wrong, so that none works on for nothing."""
        (self.folder / PROBLEM).touch()

    def has_problem(self) -> bool:
        return (self.folder / PROBLEM).exists()

    def remove(self) -> None:
        """Collective."""
        barrier()
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, column: str) -> Path:
        return self.folder / f"{column}.rows"


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
