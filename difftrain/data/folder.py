"""Files of one kind below a folder, and class ids from their names: what `image_folder` and `video_folder` share.

kind: "image" or "video", by which an error calls the data set and its files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftrain.registry import InputError


@dataclass(frozen=True)
class Record:
    """One item to be: `file` relative to the folder, `where` it was named, and what stood there beside the name."""

    file: str
    where: str
    fields: dict[str, Any] = field(default_factory=dict)


def existing_folder(path: str, kind: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{kind}_folder: path {path!r} {what} (seen from {Path.cwd()}). Write the folder that holds the {kind}s.")
    return folder


def list_files(root: Path, kind: str, extensions: Sequence[str]) -> list[Record]:
    """The files below root with one of these extensions, in any case; hidden ones left out, links followed, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{kind}_folder: {error.filename} cannot be listed ({error.strerror}). Make it readable, or move it away.")

    files = []
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        fitting = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in extensions]
        files += [Path(folder, name).relative_to(root) for name in fitting]
    if not files:
        raise InputError(f"{kind}_folder: no {kind} below {root}. Looked for files ending in {', '.join(extensions)}, in any case.")
    return [Record(file.as_posix(), str(root / file)) for file in sorted(files)]


def folder_label(record: Record) -> str:
    """The first folder level."""
    folder, slash, _ = record.file.partition("/")
    if not slash:
        raise InputError(f"{record.where} lies in no class folder. Move it into one, or write labels: none.")
    return folder


def class_ids(labels: Sequence[int | str], records: Sequence[Record]) -> tuple[list[int], list[str] | None]:
    """Class ids and class names: integers are ids already, without names; strings become their places in sorted order."""
    for label, record in zip(labels, records, strict=True):
        if type(label) is not type(labels[0]):
            first = f"{records[0].where} has {labels[0]!r}"
            raise InputError(f"{record.where}: label {label!r}, but {first}. Write all labels as integers or all as names.")
    names = sorted({label for label in labels if isinstance(label, str)})
    places = {name: place for place, name in enumerate(names)}
    return [places[label] if isinstance(label, str) else label for label in labels], names or None
