"""The run folder: who holds it, which recipe it belongs to, and how the run ended."""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from difftrain.recipe import Recipe, differences, read_yaml
from difftrain.registry import InputError
from difftrain.runlog import write_atomically


def prepare(recipe: Recipe, fresh: bool, accept_changes: bool) -> Path:
    """The folder of the run, made or found again; refuses another run's folder, another recipe, and what cannot be written.

    Nothing in it changes before it is held.
    """
    folder = Path(recipe.output).expanduser()
    if fresh:
        folder = next_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"output: the folder {str(folder)!r} cannot be written to ({error.strerror}). Write another output:.") from error
    known = folder / "recipe.yaml"
    if known.exists():
        refuse_changes(known, recipe, accept_changes)
    elif any(entry.name not in ("status.json", ".lock") for entry in folder.iterdir()):
        raise InputError(f"output: the folder {str(folder)!r} holds other files and no run. Write another output:, or empty it.")
    return folder


def refuse_changes(known: Path, recipe: Recipe, accept: bool) -> None:
    """Another recipe than the run's is refused, unless accepted; training.steps may be raised and the output renamed."""
    old, new = read_yaml(known.read_text(), str(known)), recipe.dump()
    old["output"] = new["output"]
    if old.get("training", {}).get("steps", 0) <= new["training"]["steps"]:
        old.setdefault("training", {})["steps"] = new["training"]["steps"]
    if old != new and not accept:
        raise InputError(
            f"{known.parent} was trained with another recipe:\n{differences(old, new)}\n"
            "Write --accept-changes to resume with the new one, --fresh to start over in a new folder, or another output:."
        )


def next_free(folder: Path) -> Path:
    """The folder itself, or its name with the first number that is not taken."""
    if not folder.exists():
        return folder
    number = 2
    while (candidate := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within: the folder belongs to this run. Another run gets a message; the lock goes with the process."""
    stream: IO[str] = (folder / ".lock").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise InputError(f"output: the folder {str(folder)!r} is held by another run ({holder}). "
                         "Wait for it, stop it, or write another output:.") from None
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        yield
    finally:
        stream.close()


def write_status(folder: Path, code: int | None, message: str) -> None:
    """status.json; code None means running. It must not hide why a run ended: a failure to write is left to the exit code."""
    with contextlib.suppress(OSError):
        write_atomically(folder / "status.json", json.dumps({"code": code, "message": message, "time": time.time()}) + "\n")


def environment(processes: int, device: str, parameters: int, seconds: dict[str, float], trains: str | None = None) -> dict[str, Any]:
    """Versions and machine, for the report. trains: which of the parameters, where not all."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
        return None

    packages = {name: of(name) for name in ("difftrain", "torch", "diffusers", "accelerate", "transformers")}
    return {
        **packages, "python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count(),
        "processes": processes, "device": device, "parameters": parameters, "trains": trains, "seconds": seconds,
    }
