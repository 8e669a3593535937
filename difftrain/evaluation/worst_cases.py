"""A picture of the generated images nearest to training images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.sources.base import Source
from difftrain.generation.pictures import grid


def draw_worst_cases(
    extraction: Extraction, training: Source, cases: Sequence[dict[str, Any]]
) -> Tensor:
    """Draw generated images above the training images nearest to them.

    Collective, if the images were not kept and making them again is.

    Args:
        extraction: Of the generated images.
        training: The training images.
        cases: Each with the `index` of a generated image and `training`, that of its neighbour.

    Returns:
        One picture [C, H', W'] uint8.
    """
    indices = [case["index"] for case in cases]
    wanted = [[case["training"]] for case in cases]
    made = extraction.kept_images(indices)
    if made is None:
        made = made_again(extraction.source, indices)
    neighbours = [block.samples for block in training.blocks(wanted)]
    return grid(torch.cat([made, *neighbours]), columns=len(cases))


def made_again(source: Source, indices: Sequence[int]) -> Tensor:
    """Ask a source once more for the blocks that hold some samples, and return these [n, ...]."""
    size = source.block_size
    starts = sorted({index // size * size for index in indices})
    wanted = [list(range(start, min(start + size, len(source)))) for start in starts]
    found: dict[int, Tensor] = {}
    for block_indices, block in zip(wanted, source.blocks(wanted), strict=True):
        found |= dict(zip(block_indices, block.samples.cpu(), strict=True))
    return torch.stack([found[index] for index in indices])
