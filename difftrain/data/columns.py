"""Which columns of a `datasets` table or stream are the image, the label and the caption, and how an item is made of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import PIL.Image

from difftrain.data.items import DAMAGED, Item, UnreadableImage, open_image
from difftrain.registry import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns to read. ids: class ids of labels that are strings."""

    image: str
    label: str | None
    caption: str | None
    class_names: list[str] | None
    ids: dict[str, int] | None

    def item(self, row: Row, name: str) -> Item:
        image = decode(row[self.image], name)
        label = None if self.label is None else present(row[self.label], self.label, name)
        caption = None if self.caption is None else present(row[self.caption], self.caption, name)
        return Item(image, label if self.ids is None or label is None else self.ids[label], caption, name)


def present(value: Any, column: str, name: str) -> Any:
    if value is None:
        raise InputError(f"{name} is empty in column {column!r}. Filter such rows out of the data, or do not name the column.")
    return value


def decode(value: Any, name: str) -> PIL.Image.Image:
    """The image of bytes, or of a struct of bytes or path (a local path or an address that fsspec opens)."""
    encoded, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if encoded is not None:
        return open_image(BytesIO(encoded), f"{name} ({path})" if path else name)
    if path is None:
        raise UnreadableImage(name, "it has neither bytes nor a path")
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as file:
            return open_image(file, f"{name} ({path})")
    except DAMAGED as error:
        raise UnreadableImage(f"{name} ({path})", str(error)) from error


def find_columns(source: Any, image: str, label: str | None, caption: str | None, streaming: bool) -> Columns:
    """The columns, checked to be there and of a fitting type."""
    import datasets

    features = source.features or datasets.Dataset.from_list(list(source.take(1))).features
    for key, column in {"image_column": image, "label_column": label, "caption_column": caption}.items():
        if column is not None and column not in features:
            raise InputError(f"huggingface: {key} {column!r} is not a column. Columns are: {', '.join(features)}.")
    if not holds_images(features[image]):
        raise InputError(f"huggingface: column {image!r} holds {features[image]}, expected encoded images or their bytes.")
    if caption is not None and "string" not in str(getattr(features[caption], "dtype", "")):
        raise InputError(f"huggingface: caption_column {caption!r} holds {features[caption]}, expected strings.")
    names, are_strings = class_names(source, features, label, streaming) if label is not None else (None, False)
    return Columns(image, label, caption, names, {n: i for i, n in enumerate(names)} if names and are_strings else None)


def holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary"):
        return True
    return isinstance(feature, dict) and "bytes" in feature


def class_names(source: Any, features: Any, label: str, streaming: bool) -> tuple[list[str] | None, bool]:
    """Class names where there are any, and whether the column holds them instead of their ids."""
    import datasets

    feature = features[label]
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), False
    if "int" in dtype:
        return None, False
    if "string" not in dtype:
        raise InputError(f"huggingface: label_column {label!r} holds {dtype}, expected class labels, integers or strings.")
    if streaming:
        raise InputError(f"huggingface: label_column {label!r} holds strings, whose ids need a look at all rows. Write streaming: false.")
    found = source.unique(label)
    if None in found:
        raise InputError(f"huggingface: label_column {label!r} is empty in some rows. Filter them out of the data.")
    return sorted(found), True


def as_encoded(source: Any, columns: Columns) -> Any:
    """Only the columns that are read, with images left to our own decoding and its errors."""
    import datasets

    if source.features and isinstance(source.features[columns.image], datasets.Image):
        source = source.cast_column(columns.image, datasets.Image(decode=False))
    return source.select_columns(list(dict.fromkeys(c for c in (columns.image, columns.label, columns.caption) if c)))
