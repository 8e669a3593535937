"""A folder of images, with classes from its subfolders, or classes and captions from files beside the images."""

import codecs
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from difftrain.data.folder import Record, class_ids, existing_folder, folder_label, list_files
from difftrain.data.items import Item, open_image
from difftrain.registry import DATASETS, InputError

EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA = "metadata.jsonl"


@DATASETS.register("image_folder")
class ImageFolder:
    """Images below `path` at any depth, hidden ones left out, links followed, in the order of their paths.

    labels: "folders" (the first folder level is the class; ids in sorted order) or "metadata" (key `label`).
    captions: "sidecar" (`photo.txt` beside `photo.png`) or "metadata" (key `caption`, else `text`).
    With "metadata" the data set is what `metadata.jsonl` in `path` lists: an object a line, with `file_name` relative to `path`.
    Labels there are integers, or strings: class ids are then their places in sorted order. Other images there are left out (`unlisted`).
    """

    def __init__(
        self,
        path: str,
        labels: Literal["folders", "metadata", "none"] = "none",
        captions: Literal["sidecar", "metadata", "none"] = "none",
    ):
        self.root = existing_folder(path, "image")
        self.has_metadata = "metadata" in (labels, captions)
        records = read_metadata(self.root) if self.has_metadata else list_files(self.root, "image", EXTENSIONS)
        self.files = [record.file for record in records]
        self.labels: list[int] | None = None
        self.class_names: list[str] | None = None
        if labels != "none":
            label_of = folder_label if labels == "folders" else metadata_label
            self.labels, self.class_names = class_ids([label_of(record) for record in records], records)
        self.captions = [metadata_caption(record) for record in records] if captions == "metadata" else None
        self.has_sidecars = captions == "sidecar"
        if self.has_sidecars:
            check_sidecars(self.root, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        path = self.root / self.files[i]
        caption = read_sidecar(path) if self.has_sidecars else self.captions[i] if self.captions else None
        return Item(open_image(path, str(path)), self.labels[i] if self.labels else None, caption, str(path))

    def unlisted(self) -> list[str]:
        """Images below the folder that metadata.jsonl, where it says what the data set is, does not list."""
        if not self.has_metadata:
            return []
        listed = {os.path.normpath(file) for file in self.files}
        try:
            return [record.file for record in list_files(self.root, "image", EXTENSIONS) if record.file not in listed]
        except InputError:  # those that are listed lie elsewhere, or are of another extension
            return []


def read_metadata(root: Path) -> list[Record]:
    """The lines of metadata.jsonl, sorted by file name; an error names the line."""
    path = root / METADATA
    if not path.is_file():
        raise InputError(f"image_folder: {path} does not exist. Write it, one {example()} a line, or other labels and captions.")
    lines = enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1)
    records = [parse_line(line, f"{path}:{number}", root) for number, line in lines if line.strip()]
    if not records:
        raise InputError(f"image_folder: {path} has no lines. Expected one {example()} a line.")
    refuse_repeated(records)
    return sorted(records, key=lambda record: Path(record.file))


def parse_line(line: bytes, where: str, root: Path) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}). Expected one {example()}.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise InputError(f"{where}: no file_name. Expected one {example()}.")
    if not (root / fields["file_name"]).is_file():
        raise InputError(f"{where}: file_name {fields['file_name']!r} is not a file below {root}. Correct or remove the line.")
    return Record(fields["file_name"], where, fields)


def refuse_repeated(records: Sequence[Record]) -> None:
    first: dict[str, Record] = {}
    for record in records:
        earlier = first.setdefault(os.path.normpath(record.file), record)
        if earlier is not record:
            raise InputError(f"{record.where}: file_name {record.file!r} is that of {earlier.where} too. Keep one of the lines; the whole "
                             "set counts more often by data: {type: mixed, repeats: [2], ...}.")


def example() -> str:
    return 'object like {"file_name": "a/photo.png", "label": "cat", "caption": "a cat"}'


def metadata_label(record: Record) -> int | str:
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise InputError(f"{record.where}: label {label!r}. With labels: metadata each line needs an integer or a class name.")
    return label


def metadata_caption(record: Record) -> str:
    caption = record.fields.get("caption", record.fields.get("text"))
    if not isinstance(caption, str):
        raise InputError(f"{record.where}: caption {caption!r}. With captions: metadata each line needs a string at caption or text.")
    return caption


def check_sidecars(root: Path, files: Sequence[str]) -> None:
    missing = [file for file in files if not (root / file).with_suffix(".txt").is_file()]
    if missing:
        sidecar = (root / missing[0]).with_suffix(".txt")
        raise InputError(
            f"image_folder: {len(missing)} of {len(files)} images have no caption file; {root / missing[0]} needs {sidecar}. "
            "Write the missing ones, or move such images away; a model that takes no prompts needs none (captions: none)."
        )


def read_sidecar(image: Path) -> str:
    path = image.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"caption file {path} cannot be read: {error}. Expected text in UTF-8.") from error
