"""The run folder: who holds it, which recipe it belongs to, and how the run ended."""

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from difftrain.core.errors import InputError
from difftrain.core.files import writable_folder, write_text
from difftrain.recipe.changes import changed_keys, differences, training_part
from difftrain.recipe.reading import parse
from difftrain.recipe.schema import Recipe
from difftrain.recipe.yaml_text import read_yaml
from difftrain.run.facts import check_format

RECIPE_FILE = "recipe.yaml"
IMPORTS_FOLDER = "imports"  # copies of the user's own modules, so that the folder stands on its own
KEPT = ("status.json", ".lock")  # what may lie in the folder of a run that has not begun


@dataclass(frozen=True)
class Found:
    """A run folder that is ready for a run.

    Args:
        folder: The folder.
        changes: What differs from the recipe of an earlier start: [before, after] by dotted key.
    """

    folder: Path
    changes: dict[str, list[Any]]


def prepare(recipe: Recipe, fresh: bool, accept_changes: bool) -> Found:
    """Make the folder of a run, or find it again. Nothing in it changes before it is held.

    Args:
        recipe: The recipe.
        fresh: Whether to start over, in a new folder if there is one of this name.
        accept_changes: Whether a recipe that differs in what trains is accepted.

    Raises:
        InputError: If the folder cannot be written to, holds other files, was written in another
            format, or belongs to a run that trains something else.
    """
    folder = Path(recipe.output).expanduser()
    if fresh:
        folder = next_free(folder)
    writable_folder(folder, "output")
    known = folder / RECIPE_FILE
    if known.exists():
        check_format(folder)
        return Found(folder, changes_since(known, recipe, accept_changes))
    if any(entry.name not in KEPT for entry in folder.iterdir()):
        raise InputError(
            f"output: the folder {str(folder)!r} holds other files and no run. Write another "
            "output:, or empty it."
        )
    return Found(folder, {})


def changes_since(known: Path, recipe: Recipe, accept: bool) -> dict[str, list[Any]]:
    """Compare a recipe with that of the run, and refuse changes of what trains unless accepted.

    `training.steps` may be raised, and the output may be renamed.

    Args:
        known: The recipe file of the run.
        recipe: The recipe that is given now.
        accept: Whether all changes are accepted.

    Returns:
        [before, after] of each dotted key that differs.

    Raises:
        InputError: With the differences, and what to write.
    """
    old = read_yaml(known.read_text(), str(known))
    new = recipe.dump()
    old["output"] = new["output"]
    changes = changed_keys(old, new)
    if not changes or accept:
        return changes
    earlier = read_earlier(known, old)
    if earlier is None:
        before, now = old, new
    else:
        before, now = training_part(earlier), training_part(recipe)
    steps = before.get("training", {}).get("steps", 0)
    if steps <= now["training"]["steps"]:
        before.setdefault("training", {})["steps"] = now["training"]["steps"]
    if before != now:
        raise InputError(
            f"{known.parent} was trained with another recipe:\n{differences(before, now)}\n"
            "Write --accept-changes to resume with the new one, --fresh to start over in a new "
            "folder, or another output:."
        )
    return changes


def read_earlier(known: Path, data: dict[str, Any]) -> Recipe | None:
    """Check the recipe of an earlier start; None if its parts are not known any more."""
    try:
        return parse(data, folder=known.parent / IMPORTS_FOLDER)
    except InputError:
        return None


def next_free(folder: Path) -> Path:
    """Return the folder itself, or its name with the first number that is not taken."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder within the context. The lock is released when the process ends.

    Raises:
        InputError: If another run holds it.
    """
    stream: IO[str] = (folder / ".lock").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise InputError(
            f"output: the folder {str(folder)!r} is held by another run ({holder}). Wait for it, "
            "stop it, or write another output:."
        ) from None
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        yield
    finally:
        stream.close()


def keep_imports(recipe: Recipe, folder: Path) -> None:
    """Copy the recipe's own modules into the run folder, so that it stands on its own.

    Modules that are installed as packages are left where they are.
    """
    for name in recipe.imports:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts:
            continue
        origin = Path(spec.origin)
        is_package = origin.name == "__init__.py"
        source = origin.parent if is_package else origin
        levels = name.split(".")
        target = folder / IMPORTS_FOLDER / Path(*levels[:-1]) / source.name
        if target.exists() and target.samefile(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_package:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copyfile(source, target)


def write_status(folder: Path, code: int | None, message: str) -> None:
    """Write status.json; code None means that the run is running.

    An error while writing is ignored, so that it does not hide why the run ended.
    """
    status = {"code": code, "message": message, "time": time.time()}
    with contextlib.suppress(OSError):
        write_text(folder / "status.json", json.dumps(status) + "\n")


def environment(
    processes: int,
    device: str,
    parameters: int,
    seconds: dict[str, float],
    trains: str | None = None,
) -> dict[str, Any]:
    """Describe versions and machine, for the report.

    Args:
        processes: World size.
        device: The device of a process.
        parameters: Parameters of the network.
        seconds: Seconds that each kind of work took.
        trains: Which of the parameters train, where not all do.
    """
    names = ("difftrain", "torch", "diffusers", "accelerate", "transformers")
    return {
        **{name: version_of(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes,
        "device": device,
        "parameters": parameters,
        "trains": trains,
        "seconds": seconds,
    }


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None
