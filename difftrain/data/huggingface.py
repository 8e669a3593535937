"""Images from `datasets.load_dataset`: the hub, or local parquet, Arrow, webdataset and the rest, as a table or a stream.

The table and the stream differ only in how they come to a row; `columns` makes an item of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from difftrain.data.columns import Columns, Row, as_encoded, find_columns
from difftrain.data.items import Item
from difftrain.data.streaming import shuffled_rows
from difftrain.registry import DATASETS, InputError, PositiveInt

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 1000


@DATASETS.register("huggingface")
def huggingface(
    path: str,
    name: str | None = None,
    data_files: str | list[str] | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    shuffle_buffer: PositiveInt = SHUFFLE_BUFFER,
) -> HuggingFaceTable | HuggingFaceStream:
    """`datasets.load_dataset(path, name, data_files=..., split=...)`; local files as `path: parquet, data_files: train.parquet`.

    The image column holds encoded images (the Image feature, bytes, or a struct of bytes and path); labels are class labels,
    integers, or in a table strings, whose ids are their places in sorted order. streaming: rows are read in order, nothing is
    downloaded before; see HuggingFaceStream for what that means for the order.
    """
    if not streaming and shuffle_buffer != SHUFFLE_BUFFER:
        raise InputError(f"shuffle_buffer {shuffle_buffer} has no effect on a table, whose order is a full permutation. Leave it out.")
    source = load(path, name, data_files, split, streaming)
    columns = find_columns(source, image_column, label_column, caption_column, streaming)
    source = as_encoded(source, columns)
    return HuggingFaceStream(source, columns, shuffle_buffer) if streaming else HuggingFaceTable(source, columns)


class HuggingFaceTable:
    """Rows by index, memory-mapped by `datasets`."""

    def __init__(self, source: datasets.Dataset, columns: Columns):
        self.source, self.columns = source, columns
        self.class_names = columns.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Item:
        return self.columns.item(self.source[i], f"row {i}")


class HuggingFaceStream:
    """Rows in order, shuffled through a buffer; every epoch reads the shards in another order.

    Each process reads its own share, so the order depends on the number of processes; on a given number it is a function of
    the seed, and a run resumes exactly, by reading again, undecoded, what it has consumed.
    """

    def __init__(self, source: datasets.IterableDataset, columns: Columns, shuffle_buffer: int):
        self.source, self.columns, self.shuffle_buffer = source, columns, shuffle_buffer
        self.class_names = columns.class_names

    def rows(self, seed: int, process_index: int, num_processes: int) -> Iterator[tuple[int, Row]]:
        """(n, row) for n = 0, 1, ... without end: this process's share, epoch after epoch."""
        return enumerate(shuffled_rows(self.source, self.shuffle_buffer, seed, process_index, num_processes))

    def item(self, row: tuple[int, Row]) -> Item:
        return self.columns.item(row[1], f"row {row[0]} of the shuffled stream")


def load(path: str, name: str | None, data_files: str | list[str] | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        source = datasets.load_dataset(path, name, data_files=data_files, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        files = f", data_files {data_files!r}" if data_files is not None else ""
        raise InputError(
            f"huggingface: path {path!r}, name {name!r}{files}, split {split!r} cannot be loaded: {error}. Expected what "
            "datasets.load_dataset takes: a data set of the hub, a folder, or a format such as parquet with data_files."
        ) from error
    if not streaming and len(source) == 0:
        raise InputError(f"huggingface: split {split!r} of {path!r} has no rows.")
    return source
