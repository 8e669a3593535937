"""Views of feature rows: some of them, or several sets one after the other, read when they are asked for."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from difftrain.evaluation.rows import BLOCK, Rows


class Selected:
    """The rows of these indices [n] (long), in their order."""

    def __init__(self, rows: Rows, indices: Tensor):
        self.rows, self.indices, self.width = rows, indices, rows.width

    def __len__(self) -> int:
        return len(self.indices)

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        return (self.rows.take(part) for part in self.indices.split(size) if len(part))

    def take(self, indices: Tensor) -> Tensor:
        return self.rows.take(self.indices[indices])


class Joined:
    """The rows of several sets of one width, one set after the other."""

    def __init__(self, parts: Sequence[Rows]):
        assert len({part.width for part in parts}) == 1
        self.parts, self.width = list(parts), parts[0].width
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        return (self.take(part) for part in torch.arange(len(self)).split(size) if len(part))

    def take(self, indices: Tensor) -> Tensor:
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


def piece(rows: Rows, start: int, size: int) -> Tensor:
    """Rows start .. start + size - 1, as many as there are, in float64."""
    return rows.take(torch.arange(start, min(start + size, len(rows)))).double()
