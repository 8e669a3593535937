"""A folder of samples, which says what made it, so that those of two models never mix."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.core.files import write_json, write_text
from difftrain.data.datasets.folder import GRID_FILE, MADE_FILE
from difftrain.data.datasets.image_folder import METADATA

FORMAT = 1
SAMPLES_FILE = "samples.npy"  # of samples that are tensors
SCATTER_FILE = "scatter.png"
NEEDED = ("run", "step", "num", "is_complete")  # keys of the file
BESIDE = (GRID_FILE, SAMPLES_FILE, SCATTER_FILE, METADATA, MADE_FILE)  # beside the samples


class SampleFolder:
    """The folder into which samples are written.

    Args:
        folder: The folder.
        option: What a message calls it, such as "--out".
    """

    def __init__(self, folder: Path, option: str = "--out"):
        self.folder, self.option = folder, option

    @property
    def file(self) -> Path:
        """The file that says what made the samples."""
        return self.folder / MADE_FILE

    def check(self, overwrite: bool) -> None:
        """Refuse a folder with other files, or with earlier samples that must not be replaced.

        Args:
            overwrite: Whether earlier samples may be replaced.

        Raises:
            InputError: With what to write instead.
        """
        held = self._files()
        if not held:
            return
        made = self.read()
        if made is None:
            raise InputError(
                f"{self.option} {self.folder}: the folder holds files that difftrain sample did "
                f"not write, such as {held[0].name}. Write the path of a new or an empty folder."
            )
        if not overwrite:
            raise InputError(
                f"{self.option} {self.folder}: the folder holds {made['num']} samples of "
                f"{made['run']}, step {made['step']}. Write --overwrite to replace them, or the "
                "path of another folder."
            )
        strange = [file.name for file in held if not is_ours(file, made["num"])]
        if strange:
            raise InputError(
                f"{self.option} {self.folder}: beside the samples that would be replaced, the "
                f"folder holds {strange[0]}. Move it away, or write the path of another folder."
            )

    def begin(self, made: dict[str, Any]) -> None:
        """Remove earlier samples, and write down what the new ones are made of.

        Args:
            made: Plain data with at least "run", "step" and "num".
        """
        for file in self._files():
            file.unlink()
        write_json(self.file, {"format": FORMAT, "is_complete": False, **made})

    def end(self, made: dict[str, Any]) -> None:
        """Write down that all samples are there."""
        write_json(self.file, {"format": FORMAT, "is_complete": True, **made})

    def write_shown(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write what each sample was asked to show into metadata.jsonl.

        `image_folder` reads it, and so does the imagefolder of `datasets`.

        Args:
            records: An object for each sample: its `file_name`, and its `text` or `label`. Without
                any there is no such file.
        """
        if not records:
            return
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_text(self.folder / METADATA, "\n".join(lines) + "\n")

    def block(self) -> dict[str, Any]:
        """Return the data block of the folder, with what its samples were asked to show.

        A folder that `difftrain sample` did not write is its images alone.

        Raises:
            InputError: If metadata.jsonl is damaged.
        """
        block: dict[str, Any] = {"type": "image_folder", "path": str(self.folder)}
        file = self.folder / METADATA
        if not self.file.is_file() or not file.is_file():
            return block
        try:
            with file.open(encoding="utf-8") as lines:
                first = dict(json.loads(lines.readline()))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file} is damaged ({error}). Run difftrain sample again with --overwrite, or "
                f"remove {MADE_FILE} to score the pictures alone."
            ) from error
        if "text" in first:
            block["captions"] = "metadata"
        if "label" in first:
            block["labels"] = "metadata"
        return block

    def check_complete(self) -> None:
        """Refuse samples that were stopped before all of them were there.

        Raises:
            InputError: With what to do.
        """
        made = self.read()
        if made is not None and not made["is_complete"]:
            raise InputError(
                f"{self.option} {self.folder}: sampling was stopped before all {made['num']} "
                f"samples of {made['run']} were there. Run difftrain sample again with --overwrite."
            )

    def read(self) -> dict[str, Any] | None:
        """Return what made the samples; None where no such file is there.

        Raises:
            InputError: If the file is damaged, or of another format.
        """
        if not self.file.is_file():
            return None
        try:
            found = json.loads(self.file.read_text())
            given = found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.file} is damaged ({error!r}). Move the folder away, or write another one."
            ) from error
        if given != FORMAT:
            raise InputError(
                f"{self.file} has format {given}, and this version reads format {FORMAT}. Move the "
                "folder away, or write another one."
            )
        missing = [key for key in NEEDED if key not in found]
        if missing:
            raise InputError(
                f"{self.file} is damaged: it lacks {', '.join(missing)}. Move the folder away, or "
                "write another one."
            )
        return dict(found)

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(file for file in self.folder.iterdir() if not file.name.startswith("."))


def is_ours(file: Path, num: int) -> bool:
    """Return whether `difftrain sample` writes a file of this name among `num` samples."""
    if file.name in BESIDE:
        return True
    return file.is_file() and file.stem.isdecimal() and int(file.stem) < num
