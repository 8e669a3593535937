"""Files and folders that appear whole or not at all, and logs of one JSON object a line.

Every file that the library writes beside its place and renames goes through this module.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
DIGESTS = "digests"  # in a store, and in the cache folder: what is remembered of files
MODE = 0o666 & ~UMASK  # of new files, as open() makes them; safetensors makes private files


def cache_home() -> Path:
    """Return the folder of what can be made again: DIFFTRAIN_CACHE, else ~/.cache/difftrain."""
    return Path(os.environ.get("DIFFTRAIN_CACHE") or "~/.cache/difftrain").expanduser()


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Write a file under another name. At the end it is renamed, after an error removed.

    Args:
        path: Where the file is to be. Its folder is made if it is missing.

    Yields:
        A path beside `path`, with the same ending, to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, on whatever machine, and no other thread
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield beside
        beside.chmod(MODE)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with write_beside(file) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write plain data as an indented JSON file, whole or not at all."""
    write_text(file, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def write_folder_beside(folder: Path) -> Iterator[Path]:
    """Write a folder under another name. At the end it is renamed, after an error removed.

    Args:
        folder: Where the folder is to be. What lies there is replaced at the end.

    Yields:
        An empty folder beside `folder` to write to.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def append(file: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line. A killed process leaves at most its last line broken."""
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def records(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file, without a last line that was cut off."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    whole = []
    for i, line in enumerate(lines):
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            if i < len(lines) - 1:
                raise
    return whole


def cut_after(file: Path, step: int) -> None:
    """Remove the lines of a JSON-lines file that belong to steps after `step`."""
    kept = [record for record in records(file) if record["step"] <= step]
    if file.exists():
        write_text(file, "".join(json.dumps(record) + "\n" for record in kept))


def writable_folder(folder: Path, option: str) -> Path:
    """Make a folder, and find out whether it can be written to before any work is done for it.

    Args:
        folder: The folder to make.
        option: What a message calls it, such as "--out".

    Raises:
        InputError: If the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{uuid.uuid4().hex[:12]}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{option}: the folder {str(folder)!r} cannot be written to ({error.strerror}). "
            "Write another folder."
        ) from error
    return folder
