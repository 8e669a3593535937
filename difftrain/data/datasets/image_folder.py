"""A folder of images, with classes from its subfolders or from files, and captions from files."""

import codecs
import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from difftrain.core.errors import InputError
from difftrain.core.file_digests import file_stamp
from difftrain.data.datasets.folder import (
    Record,
    class_ids,
    existing_folder,
    folder_label,
    list_files,
)
from difftrain.data.images import Original, is_address, kind_of, open_image
from difftrain.data.items import DATASETS, Item, MapDataset
from difftrain.data.left_out import LeftOut
from difftrain.data.opening import UnreadableImage

EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
METADATA = "metadata.jsonl"
NOT_LISTED = f"{METADATA} does not list it"
EXAMPLE = 'object like {"file_name": "a/photo.png", "label": "cat", "caption": "a cat"}'


@DATASETS.register("image_folder")
class ImageFolder(MapDataset):
    """The images below a folder at any depth, in the order of their paths.

    Hidden files are left out. Links are followed, and a folder that several links lead to is read
    once. With "metadata", the data set is what
    `metadata.jsonl` in the folder lists: one JSON object a line, with `file_name` relative to the
    folder. Labels there are integers, or names whose class ids are their places in sorted order.

    Args:
        path: The folder.
        labels: "folders" (the first folder level is the class; ids in sorted order), "metadata"
            (key `label`), or "none".
        captions: "sidecar" (`photo.txt` beside `photo.png`), "metadata" (key `caption`, else
            `text`), or "none".
        allow_outside: Whether `metadata.jsonl` may name files that do not lie below the folder.
    """

    def __init__(
        self,
        path: str,
        labels: Literal["folders", "metadata", "none"] = "none",
        captions: Literal["sidecar", "metadata", "none"] = "none",
        allow_outside: bool = False,
    ):
        self.root = existing_folder(path, "image")
        self.has_metadata = "metadata" in (labels, captions)
        self.has_sidecars = captions == "sidecar"
        if allow_outside and not self.has_metadata:
            raise InputError(
                "image_folder: allow_outside has no effect without labels: metadata or captions: "
                "metadata. Leave it out."
            )
        self._left_out: list[LeftOut] = []
        if self.has_metadata:
            records = read_metadata(self.root, allow_outside)
            self._left_out = self._beside(records)
        else:
            listing = list_files(self.root, "image", EXTENSIONS)
            records, self._left_out = listing.records, listing.left_out
        self.files = [record.file for record in records]
        self.labels: list[int] | None = None
        if labels != "none":
            label_of = folder_label if labels == "folders" else metadata_label
            self.labels, self.class_names = class_ids([label_of(one) for one in records], records)
        self.listed_captions: list[str] | None = None
        if captions == "metadata":
            self.listed_captions = [metadata_caption(record) for record in records]
        if self.has_sidecars:
            check_sidecars(self.root, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        path = self.root / self.files[i]
        caption = self._caption(i)
        return Item(open_image(path, str(path)), self._label(i), caption, str(path))

    def original(self, i: int) -> Original:
        """Return the file of image i with its label; see `MapDataset.original`.

        Raises:
            UnreadableImage: If the file is gone.
        """
        path = self.root / self.files[i]
        try:
            found = path.stat()
        except OSError as error:
            raise UnreadableImage(str(path), str(error)) from error
        stamp = file_stamp(path, found)
        return Original(str(path), self._label(i), lambda: self._caption(i), path, stamp)

    def label_counts(self) -> Counter[int] | None:
        """Count the images by class id; None without labels."""
        return None if self.labels is None else Counter(self.labels)

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield (file, caption) of every image."""
        for i, file in enumerate(self.files):
            yield str(self.root / file), self._caption(i)

    def left_out(self) -> list[LeftOut]:
        """Return what lies below the folder and is not in the data set, and why."""
        return list(self._left_out)

    def name_of(self, i: int) -> str:
        """Return the file of image i, relative to the folder."""
        return self.files[i]

    def _label(self, i: int) -> int | None:
        return self.labels[i] if self.labels else None

    def _caption(self, i: int) -> str | None:
        if self.has_sidecars:
            return read_sidecar(self.root / self.files[i])
        return self.listed_captions[i] if self.listed_captions else None

    def _beside(self, records: Sequence[Record]) -> list[LeftOut]:
        """Return what lies below the folder and is not listed in metadata.jsonl."""
        try:
            listing = list_files(self.root, "image", EXTENSIONS)
        except InputError:  # the listed images lie elsewhere, or have other extensions
            return []
        listed = {os.path.normpath(record.file) for record in records}
        others = [one.file for one in listing.records if one.file not in listed]
        strange = [one for one in listing.left_out if one.name not in listed]
        return [*(LeftOut(file, NOT_LISTED) for file in others), *strange]


def read_metadata(root: Path, allow_outside: bool = False) -> list[Record]:
    """Read metadata.jsonl.

    Args:
        root: The folder that holds it.
        allow_outside: Whether it may name files that do not lie below the folder.

    Returns:
        Its lines, sorted by file name.

    Raises:
        InputError: If the file or a line is wrong; the line is named.
    """
    path = root / METADATA
    if not path.is_file():
        raise InputError(
            f"image_folder: {path} does not exist. Create it with one {EXAMPLE} on each line, or "
            "change labels and captions."
        )
    lines = enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1)
    records = [
        parse_line(line, f"{path}:{number}", root, allow_outside)
        for number, line in lines
        if line.strip()
    ]
    if not records:
        raise InputError(f"image_folder: {path} has no lines. Expected one {EXAMPLE} a line.")
    refuse_repeated(records)
    return sorted(records, key=lambda record: Path(record.file))


def parse_line(line: bytes, where: str, root: Path, allow_outside: bool = False) -> Record:
    """Parse one line of metadata.jsonl.

    Args:
        line: The line.
        where: What a message calls it.
        root: The folder that its file lies in.
        allow_outside: Whether the file may lie elsewhere.

    Raises:
        InputError: If the line is not a JSON object that names a file.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}). Expected one {EXAMPLE}.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise InputError(f"{where}: no file_name. Expected one {EXAMPLE}.")
    name = fields["file_name"]
    if is_address(name):
        raise InputError(
            f"{where}: file_name {name!r} is an address, and only local files are read. Download "
            "it, and write its path."
        )
    is_below = not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != ".."
    if not (is_below or allow_outside):
        raise InputError(
            f"{where}: file_name {name!r} may lie outside {root}. Write a path below the folder, "
            "or allow_outside: true in the data block."
        )
    check_file(root / name, name, where, root)
    return Record(fields["file_name"], where, fields)


def check_file(path: Path, name: str, where: str, root: Path) -> None:
    """Check that metadata.jsonl names a regular file.

    Raises:
        InputError: If it names something else.
    """
    mode = None
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        mode = path.stat().st_mode
    if mode is None:
        raise InputError(
            f"{where}: file_name {name!r} is not a file below {root}. Correct or remove the line."
        )
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{where}: file_name {name!r} is {kind_of(mode)}, not a regular file. Correct or "
            "remove the line."
        )


def refuse_repeated(records: Sequence[Record]) -> None:
    """Raise an InputError if two lines name the same file."""
    first: dict[str, Record] = {}
    for record in records:
        earlier = first.setdefault(os.path.normpath(record.file), record)
        if earlier is not record:
            raise InputError(
                f"{record.where}: file_name {record.file!r} is that of {earlier.where} too. Keep "
                "one of the lines. To count the whole set more often, write data: {type: mixed, "
                "repeats: [2], ...}."
            )


def metadata_label(record: Record) -> int | str:
    """Return the label in a line of metadata.jsonl.

    Raises:
        InputError: If there is none.
    """
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise InputError(
            f"{record.where}: label {label!r}. With labels: metadata each line needs an integer or "
            "a class name."
        )
    return label


def metadata_caption(record: Record) -> str:
    """Return the caption in a line of metadata.jsonl.

    Raises:
        InputError: If there is none.
    """
    caption = record.fields.get("caption", record.fields.get("text"))
    if not isinstance(caption, str):
        raise InputError(
            f"{record.where}: caption {caption!r}. With captions: metadata each line needs a "
            "string at caption or text."
        )
    return caption


def check_sidecars(root: Path, files: Sequence[str]) -> None:
    """Check that every image has a caption file beside it.

    Args:
        root: The folder.
        files: The images, relative to the folder.

    Raises:
        InputError: If caption files are missing; they are counted, and the first is named.
    """
    missing = [file for file in files if not (root / file).with_suffix(".txt").is_file()]
    if missing:
        image = root / missing[0]
        raise InputError(
            f"image_folder: {len(missing)} of {len(files)} images have no caption file; {image} "
            f"needs {image.with_suffix('.txt')}. Write the missing ones, or move such images away. "
            "A model that takes no prompts needs no captions (captions: none)."
        )


def read_sidecar(image: Path) -> str:
    """Read the caption file beside an image.

    Raises:
        InputError: If it cannot be read as UTF-8.
    """
    path = image.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"caption file {path} cannot be read: {error}. Expected text in UTF-8."
        ) from error
