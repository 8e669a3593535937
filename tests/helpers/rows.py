"""Rows of the tests that lie in a file, in blocks."""

from pathlib import Path

import numpy as np
from torch import Tensor

from difftrain.evaluation.rows import RowsInBlocks


def filed_rows(values: Tensor, file: Path, block_size: int = 7) -> RowsInBlocks:
    """Write rows [N, D] into a file, and return them as blocks that are mapped from it."""
    array = values.numpy()
    array.tofile(file)
    mapped = np.memmap(file, array.dtype, "r", shape=array.shape)
    blocks = [mapped[start : start + block_size] for start in range(0, len(array), block_size)]
    return RowsInBlocks(blocks, array.shape[1], block_size)
