"""Images as data sets hold them, before they are decoded: name, label, caption, size from the header, and a digest of the file.

What plans (buckets) and what looks things up (a cache) goes over a whole data set, where decoding every image would take hours.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from difftrain.captions import described
from difftrain.data.columns import present
from difftrain.data.huggingface import HuggingFaceTable
from difftrain.data.image_folder import ImageFolder, read_sidecar
from difftrain.data.items import DAMAGED, ImageDataset, Item, UnreadableImage
from difftrain.data.transform import ORIENTATION, Size, upright

QUARTER_TURNS = (5, 6, 7, 8)  # values of the EXIF orientation that exchange height and width


@dataclass(frozen=True)
class Original:
    """One image of a data set.

    source: its file, its encoded bytes, or, of a data set that holds no files, the image. caption: reads it. stamp: changes with the file
    and is quick to read; None where there is no file.
    """

    name: str
    label: int | None
    caption: Callable[[], str | None]
    source: Path | bytes | PIL.Image.Image
    stamp: str | None = None

    def size(self) -> Size:
        """(height, width) as the image is meant to be seen; of a file its header says so. UnreadableImage where it does not."""
        if isinstance(self.source, PIL.Image.Image):
            image = upright(self.source)
            return image.height, image.width
        try:
            with PIL.Image.open(BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as image:
                turned = self._turned(image)
                width, height = image.size
        except DAMAGED as error:
            raise UnreadableImage(self.name, str(error) or type(error).__name__) from error
        return (width, height) if turned else (height, width)

    def digest(self) -> bytes:
        """16 bytes that belong to the image's content. UnreadableImage where the file cannot be read."""
        if isinstance(self.source, PIL.Image.Image):
            image = upright(self.source)
            looks = (image.mode, image.size, image.getpalette(), image.info.get("transparency"))
            return hashlib.blake2b(repr(looks).encode() + np.asarray(image).tobytes(), digest_size=16).digest()
        return hashlib.blake2b(self._bytes(), digest_size=16).digest()

    def _bytes(self) -> bytes:
        assert not isinstance(self.source, PIL.Image.Image)
        try:
            return self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except OSError as error:
            raise UnreadableImage(self.name, str(error)) from error

    def _turned(self, image: PIL.Image.Image) -> bool:
        if image.format == "TIFF":  # its size is the turned one already
            return False
        if image.format == "PNG" and "exif" not in image.info and not any(mark in self._bytes() for mark in (b"eXIf", b"exif")):
            return False  # Pillow would decode the whole image to look behind it
        try:
            return image.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
        except DAMAGED:  # damaged EXIF beside good pixels
            return False


@singledispatch
def original(dataset: Any, i: int) -> Original:
    """Image i of a table. UnreadableImage where it cannot be found; what knows of no files is asked for the decoded item."""
    if hasattr(dataset, "original"):
        return dataset.original(i)
    item = dataset[i]
    assert isinstance(item, Item)
    return Original(item.name, item.label, lambda: item.caption, item.image)


@original.register
def of_folder(dataset: ImageFolder, i: int) -> Original:
    path = dataset.root / dataset.files[i]
    try:
        stat = path.stat()
    except OSError as error:
        raise UnreadableImage(str(path), str(error)) from error
    stamp = f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
    return Original(str(path), dataset.labels[i] if dataset.labels else None, lambda: caption_in_folder(dataset, i), path, stamp)


@original.register
def of_table(dataset: HuggingFaceTable, i: int) -> Original:
    row, columns, name = dataset.source[i], dataset.columns, f"row {i}"
    label = None if columns.label is None else present(row[columns.label], columns.label, name)
    label = label if columns.ids is None or label is None else columns.ids[label]
    caption = None if columns.caption is None else present(row[columns.caption], columns.caption, name)
    return Original(name, label, lambda: caption, encoded(row[columns.image], name))


def encoded(value: Any, name: str) -> bytes:
    """The file that a cell of an image column holds or names."""
    held, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if held is not None:
        return held
    if path is None:
        raise UnreadableImage(name, "it has neither bytes nor a path")
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except DAMAGED as error:
        raise UnreadableImage(f"{name} ({path})", str(error)) from error


def check_captions(dataset: ImageDataset, key: str = "data") -> None:
    """Refuse images without a caption, or with an empty one: all images whose captions lie apart from them, of others the first.
    key: of the data set in the recipe."""
    for name, caption in captions_of(dataset):
        described(caption, name if key == "data" else f"{name} ({key})")


@singledispatch
def captions_of(dataset: Any) -> Iterator[tuple[str, str | None]]:
    """(name, caption) of the images that need not be decoded for it, and else of the first one."""
    if hasattr(dataset, "captions_of_all"):
        yield from dataset.captions_of_all()
    else:
        first = original(dataset, 0)
        yield first.name, first.caption()


@captions_of.register
def in_folder(dataset: ImageFolder) -> Iterator[tuple[str, str | None]]:
    for i, file in enumerate(dataset.files):
        yield str(dataset.root / file), caption_in_folder(dataset, i)


@captions_of.register
def in_table(dataset: HuggingFaceTable) -> Iterator[tuple[str, str | None]]:
    column = dataset.columns.caption
    if column is None:
        yield "row 0", None
        return
    for i, row in enumerate(dataset.source.select_columns([column])):
        yield f"row {i}", present(row[column], column, f"row {i}")


def caption_in_folder(dataset: ImageFolder, i: int) -> str | None:
    if dataset.has_sidecars:
        return read_sidecar(dataset.root / dataset.files[i])
    return dataset.captions[i] if dataset.captions else None
