"""Feature rows [N, D] by image index, in memory or in a file: read in blocks, so that what is computed from them need not hold them all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from difftrain.registry import InputError

BLOCK = 1024


class Rows(Protocol):
    """N rows of one width; row i belongs to image i."""

    width: int

    def __len__(self) -> int: ...

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        """Consecutive rows [size, D], the last block shorter."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """The rows [n, D] of these indices [n] (long), in their order."""
        ...


class RowsInMemory:
    """The rows of a tensor [N, D]."""

    def __init__(self, rows: Tensor):
        if rows.ndim != 2:
            raise InputError(f"features must be [N, D], one row per image, got {list(rows.shape)}.")
        self.rows, self.width = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        yield from self.rows.split(size) if len(self.rows) else ()

    def take(self, indices: Tensor) -> Tensor:
        return self.rows[indices]


class RowsInFile:
    """The rows of a file of plain numbers, row after row."""

    def __init__(self, path: Path, width: int, dtype: str = "float32"):
        self.path, self.width, self.dtype = Path(path), width, np.dtype(dtype)
        self.num, rest = divmod(self.path.stat().st_size, width * self.dtype.itemsize)
        if rest:
            raise InputError(f"{path}: {self.path.stat().st_size} bytes are not whole rows of {width} {dtype} numbers.")

    def __len__(self) -> int:
        return self.num

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        with self.path.open("rb") as file:
            while len(rows := np.fromfile(file, self.dtype, size * self.width)):
                yield torch.from_numpy(rows.reshape(-1, self.width))

    def take(self, indices: Tensor) -> Tensor:
        if not len(indices):
            return torch.from_numpy(np.empty((0, self.width), self.dtype))
        mapped = np.memmap(self.path, self.dtype, "r", shape=(self.num, self.width))
        return torch.from_numpy(np.asarray(mapped[indices.numpy()]))


def as_rows(features: Tensor | Rows) -> Rows:
    return RowsInMemory(features) if isinstance(features, Tensor) else features


def whole(features: Tensor | Rows) -> Tensor:
    """All rows at once, [N, D]."""
    if isinstance(features, Tensor):
        return features
    return torch.cat(list(features.blocks())) if len(features) else torch.empty(0, features.width)
