"""Rows of a block of samples: features, and what else belongs to each sample."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.checks import broken_rows
from difftrain.evaluation.evidence import MAIN, NEAREST, TEXT
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.store import Column

LABEL, CONTENT, IMAGE = "label", "content", "image"  # columns that metrics do not see
MOST_KEPT = 2**28  # bytes of images that are kept with their rows
SHOWN = 5  # samples that a message names

Nearest = Callable[[Tensor], Tensor]


class SampleRows:
    """Turns blocks of samples into rows of several columns.

    Args:
        source: The samples.
        extractor: What turns them into features.
        outputs: Which of its outputs are wanted; with none of them it is not asked.
        what: What messages call the set, such as "generated images".
        nearest: Gives rows [b, 2] of distance and index, see `NearestTraining`.
        keeps_images: Whether the images are kept too, unless they are too many.
        reads_text: Whether the captions' rows are wanted.

    Attributes:
        columns: The columns by name.
    """

    def __init__(
        self,
        source: Source,
        extractor: FeatureExtractor,
        outputs: Sequence[str],
        what: str,
        nearest: Nearest | None,
        keeps_images: bool,
        reads_text: bool,
    ):
        self.source, self.extractor, self.outputs = source, extractor, outputs
        self.what, self.nearest, self.reads_text = what, nearest, reads_text
        self.columns = self._columns(keeps_images)

    def __call__(self, block: SampleBlock, indices: list[int]) -> dict[str, Tensor]:
        """Return everything that is wanted of some samples, [b, width] by column.

        Args:
            block: The samples.
            indices: Their indices, for messages.

        Raises:
            InputError: If features are not finite, or if labels are missing.
        """
        samples = block.samples.cpu()
        # Features
        rows: dict[str, Tensor] = {}
        if self.outputs:
            rows = self.extractor.extract(block.samples, self.outputs)
        for name in self.outputs:
            self._check_finite(rows[name], indices, name)
        if self.reads_text:
            assert block.captions is not None
            rows[TEXT] = self.extractor.text(block.captions)
        # What else belongs to each sample
        if self.nearest is not None:
            rows[NEAREST] = self.nearest(samples)
        if self.source.has_labels:
            rows[LABEL] = self._labels(block, indices)
        rows[CONTENT] = marks_of(samples)[:, None]
        if IMAGE in self.columns:
            rows[IMAGE] = samples.flatten(1)
        return rows

    def _columns(self, keeps_images: bool) -> dict[str, Column]:
        source, widths = self.source, self.extractor.widths
        columns = {name: Column(widths[name]) for name in self.outputs}
        columns[CONTENT] = Column(1, "int64")
        if source.has_labels:
            columns[LABEL] = Column(1, "int64")
        if self.nearest is not None:
            columns[NEAREST] = Column(2, "float64")
        if keeps_images and len(source) * math.prod(source.shape) <= MOST_KEPT:
            columns[IMAGE] = Column(math.prod(source.shape), "uint8")
        if self.reads_text:
            columns[TEXT] = Column(widths[MAIN])
        return columns

    def _labels(self, block: SampleBlock, indices: list[int]) -> Tensor:
        if block.labels is None:
            raise InputError(
                f"{self.what}: some samples from {self.source.name_of(indices[0])} on have no "
                "label, but the first sample has one. Label all of them or none."
            )
        return block.labels.cpu().long()[:, None]

    def _check_finite(self, rows: Tensor, indices: list[int], output: str) -> None:
        broken = broken_rows(rows).tolist()
        if broken:
            named = ", ".join(self.source.name_of(indices[i]) for i in broken[:SHOWN])
            raise InputError(
                f"{self.what}: the {output} of {named} are not finite ({len(broken)} of a block of "
                f"{len(indices)}). A score of them would mean nothing. Look at these samples, and "
                "at the extractor."
            )


def marks_of(samples: Tensor) -> Tensor:
    """Return a number [N] int64 of each sample [N, ...], equal for equal samples alone.

    It is the XXH3-64 of type, shape and values, which costs next to nothing beside decoding.
    """
    about = f"{samples.dtype}{list(samples.shape[1:])}".encode()
    marks = []
    for sample in samples.cpu().contiguous().numpy():
        state = xxhash.xxh3_64(about)
        state.update(np.ascontiguousarray(sample).data)
        marks.append(state.intdigest() - 2**63)
    return torch.tensor(marks, dtype=torch.int64)
