"""Feature rows [N, D] by the index of their sample, in memory or in a file.

They are read in blocks, so whatever is computed from them need not hold all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difftrain.core.errors import InputError

ROWS_AT_ONCE = 1024


class Rows(ABC):
    """N rows of one width; row i belongs to sample i.

    Attributes:
        width: Numbers in a row, D.
    """

    width: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]; the last block may be shorter."""

    @abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n] (long), in their order."""

    def whole(self) -> Tensor:
        """Return all rows at once, [N, D]."""
        if not len(self):
            return torch.empty(0, self.width)
        return torch.cat(list(self.blocks()))

    def part(self, start: int, size: int) -> Tensor:
        """Return rows start to start + size - 1, as many as there are, in float64."""
        return self.take(torch.arange(start, min(start + size, len(self)))).double()


class RowsInMemory(Rows):
    """The rows of a tensor.

    Args:
        rows: [N, D].

    Raises:
        InputError: If the tensor has another number of dimensions.
    """

    def __init__(self, rows: Tensor):
        if rows.ndim != 2:
            raise InputError(
                f"features must be [N, D], one row a sample, but these are {list(rows.shape)}."
            )
        self.rows, self.width = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]."""
        if len(self.rows):
            yield from torch.split(self.rows, size)

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n]."""
        return self.rows[indices]


class RowsInFile(Rows):
    """The rows of a file of plain numbers, row after row.

    Args:
        path: The file.
        width: Numbers in a row.
        dtype: Their type, by numpy's name.

    Raises:
        InputError: If the file does not hold whole rows.
    """

    def __init__(self, path: Path, width: int, dtype: str = "float32"):
        self.path, self.width, self.dtype = Path(path), width, np.dtype(dtype)
        num_bytes = self.path.stat().st_size
        self.num, rest = divmod(num_bytes, width * self.dtype.itemsize)
        if rest:
            raise InputError(
                f"{path}: {num_bytes} bytes are not whole rows of {width} {dtype} numbers. "
                "Delete the file."
            )

    def __len__(self) -> int:
        return self.num

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]."""
        with self.path.open("rb") as file:
            while True:
                rows = np.fromfile(file, self.dtype, size * self.width)
                if not len(rows):
                    return
                yield torch.from_numpy(rows.reshape(-1, self.width))

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n]."""
        if not len(indices):
            return torch.from_numpy(np.empty((0, self.width), self.dtype))
        mapped = np.memmap(self.path, self.dtype, "r", shape=(self.num, self.width))
        return torch.from_numpy(np.asarray(mapped[indices.numpy()]))


class SelectedRows(Rows):
    """Some rows of others.

    Args:
        rows: The others.
        indices: Which ones [n] (long), in the order that they have here.
    """

    def __init__(self, rows: Rows, indices: Tensor):
        self.rows, self.indices, self.width = rows, indices, rows.width

    def __len__(self) -> int:
        return len(self.indices)

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]."""
        return (self.rows.take(part) for part in torch.split(self.indices, size) if len(part))

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n]."""
        return self.rows.take(self.indices[indices])


class ConcatenatedRows(Rows):
    """The rows of several sets of one width, one set after the other.

    Args:
        parts: The sets, at least one.
    """

    def __init__(self, parts: Sequence[Rows]):
        assert len({part.width for part in parts}) == 1
        self.parts, self.width = list(parts), parts[0].width
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]."""
        every = torch.arange(len(self))
        return (self.take(part) for part in torch.split(every, size) if len(part))

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n]."""
        owner = torch.searchsorted(self.ends, indices, right=True)
        taken: Tensor | None = None
        for number, part in enumerate(self.parts):
            mine = owner == number
            if mine.any() or taken is None:
                rows = part.take(indices[mine] - (self.ends[number] - len(part)))
                taken = rows.new_empty(len(indices), self.width) if taken is None else taken
                taken[mine] = rows
        assert taken is not None
        return taken


def as_rows(features: Tensor | Rows) -> Rows:
    """Return features [N, D] as rows."""
    return RowsInMemory(features) if isinstance(features, Tensor) else features
