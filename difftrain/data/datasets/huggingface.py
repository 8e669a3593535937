"""Images from `datasets.load_dataset`: the hub, or local parquet, Arrow, webdataset and the rest.

The table and the stream differ only in how they come to a row; `columns` makes an item of it.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt
from difftrain.data.datasets.columns import (
    ROWS_AT_ONCE,
    Columns,
    Row,
    as_encoded,
    check_cells,
    find_columns,
    present,
)
from difftrain.data.datasets.streaming import shuffled_rows
from difftrain.data.images import Original, kind_of
from difftrain.data.items import DATASETS, Item, MapDataset, StreamDataset

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
    """Images of `datasets.load_dataset(path, name, data_files=..., split=...)`.

    Local files are read with `path: parquet, data_files: train.parquet`.

    Args:
        path: A data set of the hub, a folder, or a format such as parquet.
        name: The configuration of the data set.
        data_files: Files of a format.
        split: The split.
        image_column: Holds encoded images: the Image feature, bytes, or structs of bytes and path.
        label_column: Holds class labels or integers, or in a table strings, whose class ids are
            their places in sorted order.
        caption_column: Holds strings.
        streaming: Whether rows are read in order, without a download before; `HuggingFaceStream`
            says what that means for the order.
        shuffle_buffer: Rows of a stream that are held for shuffling.
    """
    if not streaming and shuffle_buffer != SHUFFLE_BUFFER:
        raise InputError(
            f"huggingface: shuffle_buffer {shuffle_buffer} has no effect without streaming: true, "
            "because a table is shuffled as a whole. Leave it out."
        )
    source = load(path, name, data_files, split, streaming)
    columns = find_columns(source, image_column, label_column, caption_column, streaming)
    source = as_encoded(source, columns)
    if streaming:
        return HuggingFaceStream(source, columns, shuffle_buffer)
    check_cells(source, columns)
    return HuggingFaceTable(source, columns)


class HuggingFaceTable(MapDataset):
    """Rows by index, memory-mapped by `datasets`.

    Args:
        source: The table.
        columns: Which columns are read.
    """

    def __init__(self, source: datasets.Dataset, columns: Columns):
        self.source = source
        self.columns = columns
        self.class_names = columns.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Item:
        return self.columns.item(self.source[i], self.name_of(i))

    def original(self, i: int) -> Original:
        """Return the encoded image of row i, its label and caption; see `MapDataset.original`.

        Raises:
            UnreadableImage: If the file that the row names cannot be read.
        """
        return self.columns.original(self.source[i], self.name_of(i))

    def label_counts(self) -> Counter[int] | None:
        """Count the rows by class id, without reading images; None without a label column.

        Raises:
            InputError: If the label of a row is empty.
        """
        column = self.columns.label
        if column is None:
            return None
        counts = Counter[int]()
        i = 0
        for batch in self.source.select_columns([column]).iter(ROWS_AT_ONCE):
            for value in batch[column]:
                counts[self.columns.label_of({column: value}, self.name_of(i))] += 1
                i += 1
        return counts

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield ("row 17", caption) of every row."""
        column = self.columns.caption
        if column is None:
            yield self.name_of(0), None
            return
        for i, row in enumerate(self.source.select_columns([column])):
            name = self.name_of(i)
            yield name, present(row[column], column, name)


class HuggingFaceStream(StreamDataset):
    """Rows in order, shuffled through a buffer; every epoch reads the shards in another order.

    Each process reads its own share, so the order depends on the number of processes. On a given
    number it is a function of the seed, and a run resumes exactly: it reads the rows that it has
    used before once more, without decoding them.

    Args:
        source: The stream.
        columns: Which columns are read.
        shuffle_buffer: Rows that are held for shuffling.
    """

    def __init__(self, source: datasets.IterableDataset, columns: Columns, shuffle_buffer: int):
        self.source = source
        self.columns = columns
        self.shuffle_buffer = shuffle_buffer
        self.class_names = columns.class_names

    def is_labelled(self) -> bool:
        """Return whether there is a label column."""
        return self.columns.label is not None

    def rows(self, seed: int, process_index: int, num_processes: int) -> Iterator[tuple[int, Row]]:
        """Yield (n, row) for n = 0, 1, ... without end; see `StreamDataset.rows`."""
        share = shuffled_rows(self.source, self.shuffle_buffer, seed, process_index, num_processes)
        return enumerate(share)

    def item(self, key: tuple[int, Row]) -> Item:
        """Decode a row that `rows` yields.

        Raises:
            UnreadableImage: If its image cannot be decoded.
        """
        n, row = key
        return self.columns.item(row, f"row {n} of the shuffled stream")


def load(
    path: str, name: str | None, data_files: str | list[str] | None, split: str, streaming: bool
) -> Any:
    """Call `datasets.load_dataset`; see `huggingface`.

    Raises:
        InputError: If nothing can be loaded, or if a table has no rows.
    """
    import datasets

    files = local_files(path, data_files)
    given: dict[str, Any] = {
        "name": name,
        "data_files": data_files,
        "split": split,
        "streaming": streaming,
    }
    try:
        source = datasets.load_dataset(path, **given)
        if not streaming and is_stale(source, files):
            source = datasets.load_dataset(path, **given, download_mode="force_redownload")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        stated = f", data_files {data_files!r}" if data_files is not None else ""
        raise InputError(
            f"huggingface: path {path!r}, name {name!r}{stated}, split {split!r} cannot be loaded: "
            f"{error}. Expected what datasets.load_dataset takes: a data set of the hub, a folder, "
            "or a format such as parquet with data_files."
        ) from error
    if not streaming and len(source) == 0:
        raise InputError(f"huggingface: split {split!r} of {path!r} has no rows.")
    return source


def local_files(path: str, data_files: str | list[str] | None) -> list[Path]:
    """Return the files of this machine that a table is made of.

    Args:
        path: As of `huggingface`.
        data_files: As of `huggingface`.

    Raises:
        InputError: If one of them is no regular file; `datasets` would wait for a named pipe.
    """
    if data_files is None:
        patterns = [f"{path}/**"] if Path(path).is_dir() else []
    else:
        patterns = [data_files] if isinstance(data_files, str) else list(data_files)
    found = [Path(file) for pattern in patterns for file in glob.glob(pattern, recursive=True)]
    there = [file for file in found if file.exists() and not file.is_dir()]
    for file in there:
        if not file.is_file():
            raise InputError(
                f"huggingface: {file} is {kind_of(file.stat().st_mode)}, not a regular file. Move "
                "it away."
            )
    return there


def is_stale(source: Any, files: Sequence[Path]) -> bool:
    """Return whether a file has changed since `datasets` made its table of it.

    `datasets` knows files by their time of modification, which a copy can set back. The time of
    change cannot be set.

    Args:
        source: The table.
        files: The files that it is made of.
    """
    tables = [Path(table["filename"]) for table in source.cache_files]
    if not tables or not files:
        return False
    made = min(table.stat().st_mtime for table in tables)
    return max(file.stat().st_ctime for file in files) > made
