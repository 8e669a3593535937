"""Files of pretrained models: where a path leads, what lies there, and what is wrong with it.

Every problem is an InputError of one line.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from difftrain.core.errors import InputError
from difftrain.core.files import write_beside

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)$")
# A weights file is identified by its size and PIECES pieces of PIECE bytes.
PIECES = 64
PIECE = 4096

# Where the files are


def single_file(path: str) -> Path | None:
    """Return the .safetensors file that a path means; None for a folder or a hub id.

    Raises:
        InputError: If the file is missing, damaged, or of a format that can run code.
    """
    file = Path(path).expanduser()
    if file.is_dir() or (file.suffix != ".safetensors" and not file.is_file()):
        return None
    if not file.is_file():
        raise InputError(
            f"model.path: there is no file {path!r}. Write a .safetensors file, a pipeline's "
            "folder, or a hub id."
        )
    if file.suffix != ".safetensors":
        raise InputError(
            f"model.path: {path!r} is not a .safetensors file, and opening a pickle (.ckpt, .pt, "
            ".bin) can run code. Convert it to .safetensors, or write the pipeline's folder."
        )
    refuse_damaged(file)
    return file


def pipeline_root(path: str, key: str) -> str:
    """Return the local folder of a pipeline, or a hub id unchanged.

    Args:
        path: What the user wrote.
        key: The recipe's key, for messages.

    Raises:
        InputError: If the path is local and no pipeline's folder.
    """
    folder = Path(path).expanduser()
    if not looks_local(path) or (folder / INDEX).is_file():
        return expanded(path)
    if not folder.is_dir():
        raise InputError(
            f"{key}: there is no folder {path!r}. Write a diffusers pipeline's folder, or a hub "
            "id such as org/name."
        )
    if (folder / "config.json").is_file():
        raise InputError(
            f"{key}: {path!r} is the folder of a single model (config.json), not of a pipeline. "
            f"Write the folder above it, which holds {INDEX}."
        )
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
    raise InputError(
        f"{key}: {path!r} holds no {INDEX}, so it is not a diffusers pipeline (it holds: {names}). "
        "Write a folder that save_pretrained made, or one .safetensors file."
    )


def config_root(file: Path, config: str | None) -> str:
    """Return the local folder with the configs of a single file.

    Args:
        file: The single file.
        config: A local folder or a hub id; None for the hub id that diffusers takes for the file.

    Raises:
        InputError: If a hub id is not in the local cache. Nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    if config is not None and looks_local(config):
        return pipeline_root(config, "model.config")
    repository = config or usual_repository(file)
    cached = try_to_load_from_cache(repository, INDEX)
    if isinstance(cached, str):
        return str(Path(cached).parent)
    reason = f"{str(file)!r} belongs to the configs of {repository!r}, which are"
    if config:
        reason = f"the hub id {config!r} is"
    raise InputError(
        f"model.config: {reason} not in the local cache, and for a single file nothing is "
        "downloaded. Write config: FOLDER, a local copy of that pipeline (its "
        f"{INDEX}, configs and tokenizers suffice)."
    )


def usual_repository(file: Path) -> str:
    """Return the hub repository whose configs diffusers takes for a single file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open

    shapes = {}
    with safe_open(file, "pt") as opened:
        for key in list(opened.keys()):
            shapes[key] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
    found: dict[str, Any] = fetch_diffusers_config(shapes)
    return str(found["pretrained_model_name_or_path"])


def fetched(repository: str, name: str, folder: str | None = None) -> Path:
    """Return a file of a hub repository, from the local cache or downloaded into it.

    Args:
        repository: The hub id.
        name: The file's name.
        folder: Its folder in the repository, if it is in one.

    Raises:
        InputError: If the file cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, subfolder=folder))
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"model.path: {repository!r} is not a local folder, and {name} of this repository of "
            f"the hub is neither in the local cache ({constants.HF_HUB_CACHE}) nor can it be "
            f"downloaded: {first_line(error).rstrip('.')}. Write a local folder instead."
        ) from error


def looks_local(path: str) -> bool:
    """Return whether a path means something on this machine rather than a hub id (org/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()


def is_local(root: str) -> bool:
    """Return whether a pipeline's root is a local folder."""
    return Path(root).is_dir()


def expanded(path: str) -> str:
    """Return the folder that a local path means; a hub id unchanged."""
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


# What the files hold


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a pretrained model.

    Args:
        file: A file that is there.

    Raises:
        InputError: If it is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(
            f"model.path: {str(file)!r} is not JSON ({error}); fetch or save it again."
        ) from error
    return content


def keys_of(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def has_keys(file: Path, prefixes: Sequence[str]) -> bool:
    """Return whether a safetensors file has a tensor whose name starts with one of `prefixes`."""
    starts = tuple(prefixes)
    return any(key.startswith(starts) for key in keys_of(file))


def variant_in(folder: Path) -> str | None:
    """Return the variant of all weights in a folder; None if some have none.

    The variant of model.fp16.safetensors is fp16.
    """
    names = [file.name for file in folder.iterdir() if file.suffix in WEIGHTS]
    variants = []
    for name in names:
        match = VARIANT.search(name)
        if match is None:
            return None
        variants.append(match[1])
    return min(variants, default=None)


def mark(file: Path) -> str:
    """Return the size of a file and a digest of pieces all over it."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for i in range(PIECES):
            opened.seek(i * max(size - PIECE, 0) // (PIECES - 1))
            digest.update(opened.read(PIECE))
    return f"{size}:{digest.hexdigest()[:16]}"


def add_metadata(file: Path, facts: Mapping[str, str]) -> None:
    """Write facts into the header of a safetensors file; the tensors are copied unchanged.

    Args:
        file: The file.
        facts: What to add to its metadata.
    """
    with write_beside(file) as beside, file.open("rb") as old, beside.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **facts}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)


# Refusals


def refuse_damaged(file: Path) -> None:
    """Refuse a .safetensors file that is cut short, or a git-lfs pointer.

    The header and the size are read, no weights.

    Raises:
        InputError: If the file is damaged.
    """
    from safetensors import SafetensorError

    try:
        keys_of(file)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"model.path: {str(file)!r} is cut short or no .safetensors file "
            f"({first_line(error)}; a git clone without lfs leaves such files). Fetch it again."
        ) from error


def refuse_missing(names: list[str], component: str, where: str) -> None:
    """Refuse a model that some weights were not found for.

    Args:
        names: Names of the missing weights.
        component: The component's name.
        where: The path that was read.

    Raises:
        InputError: If there are missing weights.
    """
    if names:
        raise InputError(
            f"model.path: {where!r} lacks {len(names)} weight(s) of the {component}, such as "
            f"{names[0]}, which would stay randomly initialized. Write a path whose weights are "
            "complete and fit its config."
        )


@contextlib.contextmanager
def readable_errors(path: str, key: str = "model.path") -> Iterator[None]:
    """Turn what a loader raises over missing or unfitting files into an InputError of one line.

    Args:
        path: What is read.
        key: The recipe's key, for messages.

    Raises:
        InputError: In place of the loader's error.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise InputError(
            f"{key}: nothing can be loaded from {path!r}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
