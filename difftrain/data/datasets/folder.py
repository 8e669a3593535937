"""Files of one kind below a folder, and class ids from their names, for image and video folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError


@dataclass(frozen=True)
class Record:
    """One item of a folder.

    Args:
        file: Its file, relative to the folder.
        where: What a message calls the place that names the file.
        fields: What else that place says about the item.
    """

    file: str
    where: str
    fields: dict[str, Any] = field(default_factory=dict)


def existing_folder(path: str, kind: str) -> Path:
    """Return the folder at a path.

    Args:
        path: The path, which may begin with "~".
        kind: "image" or "video", by which messages call the data set and its files.

    Raises:
        InputError: If there is no folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"{kind}_folder: path {path!r} {what} (seen from {Path.cwd()}). Write the folder that "
            f"holds the {kind}s."
        )
    return folder


def list_files(root: Path, kind: str, extensions: Sequence[str]) -> list[Record]:
    """List the files below a folder, at any depth, in the order of their paths.

    Hidden files and folders are left out, links are followed.

    Args:
        root: The folder.
        kind: "image" or "video", by which messages call the data set and its files.
        extensions: Endings of the files, in lower case; files may have them in any case.

    Raises:
        InputError: If there are no such files, or if a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise InputError(
            f"{kind}_folder: {error.filename} cannot be listed ({error.strerror}). Make it "
            "readable, or move it away."
        )

    files = []
    for folder, below, names in os.walk(root, followlinks=True, onerror=fail):
        below[:] = [name for name in below if not name.startswith(".")]
        shown = [name for name in names if not name.startswith(".")]
        fitting = [name for name in shown if Path(name).suffix.lower() in extensions]
        files += [Path(folder, name).relative_to(root) for name in fitting]
    if not files:
        raise InputError(
            f"{kind}_folder: no {kind} below {root}. Expected files ending in "
            f"{', '.join(extensions)}, in upper or lower case."
        )
    return [Record(file.as_posix(), str(root / file)) for file in sorted(files)]


def folder_label(record: Record) -> str:
    """Return the first folder level of a file, which is its class.

    Raises:
        InputError: If the file lies in no subfolder.
    """
    folder, slash, _ = record.file.partition("/")
    if not slash:
        raise InputError(
            f"{record.where} lies in no class folder. Move it into one, or write labels: none."
        )
    return folder


def class_ids(
    labels: Sequence[int | str], records: Sequence[Record]
) -> tuple[list[int], list[str] | None]:
    """Return class ids and class names.

    Integers are ids already, without names. The id of a name is its place in sorted order.

    Args:
        labels: N labels, all integers or all names.
        records: The N items, for messages.

    Raises:
        InputError: If some labels are integers and some are names.
    """
    for label, record in zip(labels, records, strict=True):
        if type(label) is not type(labels[0]):
            raise InputError(
                f"{record.where}: label {label!r}, but {records[0].where} has {labels[0]!r}. Write "
                "all labels as integers or all as names."
            )
    names = sorted({label for label in labels if isinstance(label, str)})
    if not names:
        return [int(label) for label in labels], None
    ids = {name: place for place, name in enumerate(names)}
    return [ids[str(label)] for label in labels], names
