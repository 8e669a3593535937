"""The columns of a `datasets` table or stream that are read, and the items that rows become."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.data.classes import class_id
from difftrain.data.images import Original, check_regular, is_address, open_image
from difftrain.data.items import Item
from difftrain.data.opening import UnreadableImage

Row = Mapping[str, Any]
ROWS_AT_ONCE = 1000  # of a label column


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Args:
        image: Name of the image column.
        label: Name of the label column, if there is one.
        caption: Name of the caption column, if there is one.
        class_names: Names of the classes by id, if there are any.
        ids: Class ids by name, where labels are strings.
    """

    image: str
    label: str | None
    caption: str | None
    class_names: list[str] | None
    ids: dict[str, int] | None

    def item(self, row: Row, name: str) -> Item:
        """Decode a row.

        Args:
            row: The row.
            name: What a message calls it.

        Raises:
            UnreadableImage: If its image cannot be decoded.
            InputError: If its label or caption is empty.
        """
        content, full_name = encoded(row[self.image], name)
        image = open_image(BytesIO(content), full_name)
        return Item(image, self._label(row, name), self._caption(row, name), name)

    def original(self, row: Row, name: str) -> Original:
        """Return what is known of a row before its image is decoded; see `item`."""
        label, caption = self._label(row, name), self._caption(row, name)
        content, _ = encoded(row[self.image], name)
        return Original(name, label, lambda: caption, content)

    def label_of(self, row: Row, name: str) -> int:
        """Return the class id of a row; there must be a label column.

        Args:
            row: The row.
            name: What a message calls it.

        Raises:
            InputError: If its label is empty, or no class id.
        """
        assert self.label is not None
        label = present(row[self.label], self.label, name)
        return class_id(label, name) if self.ids is None else self.ids[label]

    def _label(self, row: Row, name: str) -> int | None:
        return None if self.label is None else self.label_of(row, name)

    def _caption(self, row: Row, name: str) -> str | None:
        return None if self.caption is None else present(row[self.caption], self.caption, name)


def present(value: Any, column: str, name: str) -> Any:
    """Return the value of a cell that must not be empty.

    Args:
        value: The value.
        column: The cell's column.
        name: What a message calls its row.

    Raises:
        InputError: If the cell is empty.
    """
    if value is None:
        raise InputError(
            f"{name} is empty in column {column!r}. Filter such rows out of the data, or do not "
            "name the column."
        )
    return value


def encoded(value: Any, name: str) -> tuple[bytes, str]:
    """Read the image file that a cell holds or names.

    Args:
        value: Bytes, or a struct of bytes or the path of a local file.
        name: What a message calls the row.

    Returns:
        The file's content, and what a message calls the image.

    Raises:
        InputError: If the cell holds an address.
        UnreadableImage: If the cell is empty, or the file cannot be read.
    """
    content, path = value, None
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
    full_name = f"{name} ({path})" if path else name
    if isinstance(content, bytes):
        return content, full_name
    if content is not None:
        raise UnreadableImage(full_name, f"it holds a {type(content).__name__}, expected bytes")
    if path is None:
        raise UnreadableImage(name, "it has neither bytes nor a path")
    if not isinstance(path, str) or is_address(path):
        raise InputError(addressed(path, name))
    check_regular(path, full_name)
    try:
        return Path(path).read_bytes(), full_name
    except OSError as error:
        raise UnreadableImage(full_name, str(error)) from error


def addressed(path: Any, name: str) -> str:
    """Return the message about a row that names what is no local file."""
    return (
        f"{name} names {path!r}, and only local files and bytes are read. Download what it names, "
        "and write its path or its bytes into the cell."
    )


def check_cells(source: Any, columns: Columns) -> None:
    """Check labels and paths of a table when it is opened, without reading images.

    Args:
        source: A `datasets` table.
        columns: The columns that are read.

    Raises:
        InputError: If a label is empty or no class id, or if a row names an address; with the first
            such row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    # Labels
    if columns.label is not None and columns.ids is None:
        cells = source.select_columns([columns.label])
        start = 0
        for batch in cells.iter(ROWS_AT_ONCE):
            for place, value in enumerate(batch[columns.label]):
                columns.label_of({columns.label: value}, f"row {start + place}")
            start += len(batch[columns.label])
    # Paths that stand in for bytes
    images = source.data.column(columns.image)
    names = [part.name for part in images.type] if pa.types.is_struct(images.type) else []
    if "path" not in names:
        return
    paths = pc.struct_field(images, names.index("path"))
    if not (pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type)):
        return
    is_named = pc.match_substring_regex(paths, "://|^data:")
    if "bytes" in names:
        has_bytes = pc.is_valid(pc.struct_field(images, names.index("bytes")))
        is_named = pc.and_(is_named, pc.invert(has_bytes))
    row = pc.index(pc.fill_null(is_named, False), True).as_py()
    if row >= 0:
        raise InputError(addressed(paths[row].as_py(), f"row {row}"))


def find_columns(
    source: Any, image: str, label: str | None, caption: str | None, streaming: bool
) -> Columns:
    """Find the columns, and check their types.

    Args:
        source: A `datasets` table or stream.
        image: Name of the image column.
        label: Name of the label column, if there is one.
        caption: Name of the caption column, if there is one.
        streaming: Whether the source is a stream.

    Raises:
        InputError: If a column is missing or has another type.
    """
    import datasets

    # The columns are there.
    features = source.features or datasets.Dataset.from_list(list(source.take(1))).features
    wanted = {"image_column": image, "label_column": label, "caption_column": caption}
    for key, column in wanted.items():
        if column is not None and column not in features:
            raise InputError(
                f"huggingface: {key} {column!r} is not a column. Columns are: "
                f"{', '.join(features)}."
            )

    # Their types fit.
    if not holds_images(features[image]):
        raise InputError(
            f"huggingface: column {image!r} holds {features[image]}, expected encoded images or "
            "their bytes."
        )
    if caption is not None and "string" not in dtype_of(features[caption]):
        raise InputError(
            f"huggingface: caption_column {caption!r} holds {features[caption]}, expected strings."
        )

    # Classes.
    names, ids = None, None
    if label is not None:
        names, are_strings = class_names(source, features, label, streaming)
        if names and are_strings:
            ids = {name: i for i, name in enumerate(names)}
    return Columns(image, label, caption, names, ids)


def dtype_of(feature: Any) -> str:
    """Return the type of a feature's values, or else the feature's own type."""
    return str(getattr(feature, "dtype", type(feature).__name__))


def holds_images(feature: Any) -> bool:
    """Return whether a feature holds images, their bytes, or structs with their bytes."""
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or dtype_of(feature) in ("binary", "large_binary")


def class_names(
    source: Any, features: Any, label: str, streaming: bool
) -> tuple[list[str] | None, bool]:
    """Find the classes of a label column.

    Args:
        source: A `datasets` table or stream.
        features: The types of its columns.
        label: Name of the label column.
        streaming: Whether the source is a stream.

    Returns:
        Class names where there are any, and whether the column holds them instead of their ids.

    Raises:
        InputError: If the column has another type, or is empty in some rows.
    """
    import datasets

    feature = features[label]
    dtype = dtype_of(feature)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), False
    if "int" in dtype:
        return None, False
    if "string" not in dtype:
        raise InputError(
            f"huggingface: label_column {label!r} holds {dtype}, expected class labels, integers "
            "or strings."
        )
    if streaming:
        raise InputError(
            f"huggingface: label_column {label!r} holds strings, and their ids are only known once "
            "all rows are read. Write streaming: false."
        )
    found = source.unique(label)
    if None in found:
        raise InputError(
            f"huggingface: label_column {label!r} is empty in some rows. Filter them out of the "
            "data."
        )
    return sorted(found), True


def as_encoded(source: Any, columns: Columns) -> Any:
    """Keep only the columns that are read, and leave images encoded.

    Images are decoded here, not by `datasets`, so that errors name the row.

    Args:
        source: A `datasets` table or stream.
        columns: The columns that are read.
    """
    import datasets

    if source.features and isinstance(source.features[columns.image], datasets.Image):
        source = source.cast_column(columns.image, datasets.Image(decode=False))
    names = [name for name in (columns.image, columns.label, columns.caption) if name]
    return source.select_columns(list(dict.fromkeys(names)))
