"""Files of one kind below a folder, and class ids from their names, for image and video folders."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.data.classes import class_id
from difftrain.data.images import kind_of
from difftrain.data.left_out import LeftOut, in_words

# What `difftrain sample` writes beside samples: a contact sheet, and what made them
GRID_FILE, MADE_FILE = "grid.png", "samples.json"
# Endings of texts and numbers that people keep beside pictures; nobody asks why they are not read
SIDE_FILES = frozenset(
    (".cfg", ".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".npy", ".npz")
).union((".parquet", ".pdf", ".py", ".tsv", ".txt", ".xml", ".yaml", ".yml"))


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


@dataclass(frozen=True)
class Listing:
    """What lies below a folder.

    Args:
        records: The items, in the order of their paths.
        left_out: What is not read, and why, in the order of the paths.
    """

    records: list[Record]
    left_out: list[LeftOut]


def list_files(root: Path, kind: str, extensions: Sequence[str]) -> Listing:
    """List the files below a folder, at any depth, in the order of their paths.

    Hidden files and folders are left out. Links are followed, and each folder is visited once,
    however many links lead to it.

    Args:
        root: The folder.
        kind: "image" or "video", by which messages call the data set and its files.
        extensions: Endings of the files, in lower case; files may have them in any case.

    Raises:
        InputError: If there are no such files, or if a folder cannot be listed.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for entry in entries_below(root, kind, left_out):
        file = Path(entry.path).relative_to(root)
        reason = why_left_out(entry, extensions)
        if reason is None:
            files.append(file)
        elif reason:
            left_out.append(LeftOut(file.as_posix(), reason))
    left_out.sort(key=lambda one: Path(one.name))
    if not files:
        others = in_words(left_out)
        raise InputError(
            f"{kind}_folder: no {kind} below {root}. Expected files ending in "
            f"{', '.join(extensions)}, in upper or lower case."
            + (f" Left out: {others}." if others else "")
        )
    records = [Record(file.as_posix(), str(root / file)) for file in sorted(files)]
    return Listing(records, left_out)


def why_left_out(entry: os.DirEntry[str], extensions: Sequence[str]) -> str | None:
    """Return why an entry of a folder is not read; None for an item, "" for what nobody asks for.

    Args:
        entry: The entry, which is no folder.
        extensions: Endings of items.
    """
    ending = Path(entry.name).suffix.lower()
    fits = ending in extensions
    if entry.name.startswith("."):
        return "hidden" if fits else ""
    if entry.is_symlink() and not Path(entry.path).exists():
        return "a link to nothing"
    if not entry.is_file():
        return f"{kind_of(entry.stat().st_mode)}, not a regular file"
    if ending in SIDE_FILES:
        return ""
    if not fits:
        return f"ending {ending} is not read" if ending else "a name without an ending is not read"
    if entry.name == GRID_FILE and Path(entry.path).with_name(MADE_FILE).is_file():
        return "the contact sheet of difftrain sample"
    return None


def entries_below(root: Path, kind: str, left_out: list[LeftOut]) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below a folder that is no folder. Each real folder is visited once.

    The folders themselves are visited before those that links lead to.

    Args:
        root: The folder.
        kind: "image" or "video", for messages.
        left_out: Takes the links to folders that are visited already.

    Raises:
        InputError: If a folder cannot be listed.
    """
    visited: set[str] = set()
    above = Path(os.path.realpath(root)).parents
    links: list[str] = []
    waiting = [str(root)]
    while waiting or links:
        folder = waiting.pop(0) if waiting else links.pop(0)
        real = os.path.realpath(folder)
        name = Path(folder).relative_to(root).as_posix()
        if real in visited:
            left_out.append(LeftOut(name, "a link to a folder that is read already"))
            continue
        if visited and Path(real) in above:
            left_out.append(LeftOut(name, "a link to a folder that holds this one"))
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as scan:
                found = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"{kind}_folder: {error.filename} cannot be listed ({error.strerror}). Make it "
                "readable, or move it away."
            ) from error
        for entry in found:
            if not is_folder(entry):
                yield entry
            elif not entry.name.startswith("."):
                (links if entry.is_symlink() else waiting).append(entry.path)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one; False for a link in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def folder_label(record: Record) -> str:
    """Return the first folder level of a file, which is its class.

    Raises:
        InputError: If the file lies in no subfolder.
    """
    folder, slash, _ = os.path.normpath(record.file).partition("/")
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
        return [
            class_id(label, one.where) for label, one in zip(labels, records, strict=True)
        ], None
    ids = {name: place for place, name in enumerate(names)}
    return [ids[str(label)] for label in labels], names
