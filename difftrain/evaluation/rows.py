"""Feature rows [N, D] by the index of their sample, in memory or in files.

They are read in blocks, so whatever is computed from them need not hold all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

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


class RowsInBlocks(Rows):
    """Rows of consecutive blocks, each an array of its own, perhaps mapped from a file.

    Args:
        arrays: The rows of each block, [block_size, D]; those of the last may be fewer.
        width: Numbers in a row.
        block_size: Rows in a block.
    """

    def __init__(self, arrays: Sequence[np.ndarray], width: int, block_size: int):
        self.arrays, self.width, self.block_size = list(arrays), width, block_size

    def __len__(self) -> int:
        if not self.arrays:
            return 0
        return (len(self.arrays) - 1) * self.block_size + len(self.arrays[-1])

    def blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
        """Yield consecutive rows [size, D]."""
        for start in range(0, len(self), size):
            yield self._range(start, min(start + size, len(self)))

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows [n, D] of indices [n]."""
        numbers = indices.numpy()
        dtype = self.arrays[0].dtype if self.arrays else np.dtype("float32")
        taken = np.empty((len(numbers), self.width), dtype)
        owners, places = np.divmod(numbers, self.block_size)
        for owner in np.unique(owners):
            mine = owners == owner
            taken[mine] = self.arrays[owner][places[mine]]
        return torch.from_numpy(taken)

    def _range(self, start: int, end: int) -> Tensor:
        """Return rows start to end - 1."""
        parts = []
        for number in range(start // self.block_size, -(-end // self.block_size)):
            first = number * self.block_size
            parts.append(self.arrays[number][max(start - first, 0) : end - first])
        return torch.from_numpy(np.concatenate(parts))


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
