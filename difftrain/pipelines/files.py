"""The files of pretrained models: where a path leads, what lies there, and what is wrong with it, each an InputError of one line."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from difftrain.registry import InputError

INDEX = "model_index.json"
PREFIXES = {
    "unet": ("model.diffusion_model.", "down_blocks."),
    "transformer": ("model.diffusion_model.", "joint_blocks.", "double_blocks.", "transformer_blocks."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoders.t5xxl."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}  # how the keys of a component start in a single file: the original code's, then diffusers' own
VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)$")
PIECES, PIECE = 64, 4096  # of a weights file, in bytes, that tell it from others of its size


# Where the files are


def single_file(path: str) -> Path | None:
    """The file that a path means; None for a folder or a hub id."""
    file = Path(path).expanduser()
    if file.suffix != ".safetensors" and not file.is_file():
        return None
    if file.is_dir():
        return None
    if not file.is_file():
        raise InputError(f"model.path: there is no file {path!r}. Write a .safetensors file, a pipeline's folder, or a hub id.")
    if file.suffix != ".safetensors":
        raise InputError(f"model.path: {path!r} is not a .safetensors file, and opening a pickle (.ckpt, .pt, .bin) can run code. "
                         "Convert it to .safetensors, or write the pipeline's folder.")
    refuse_damaged(file)
    if not any(holds(file, component) for component in PREFIXES):
        raise InputError(f"model.path: {path!r} holds no model of a pipeline (its first key: {min(keys_of(file), default='none')!r}); "
                         "write a checkpoint's file, or a pipeline's folder. A LoRA goes onto the model that it was trained on.")
    return file


def pipeline_root(path: str, key: str) -> str:
    """The local folder of a pipeline, or a hub id as it is."""
    folder = Path(path).expanduser()
    if not looks_local(path) or (folder / INDEX).is_file():
        return expanded(path)
    if not folder.is_dir():
        raise InputError(f"{key}: there is no folder {path!r}. Write a diffusers pipeline's folder, or a hub id such as org/name.")
    if (folder / "config.json").is_file():
        raise InputError(f"{key}: {path!r} is the folder of a single model (config.json), not of a pipeline; write the folder above it, "
                         f"which holds {INDEX}.")
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
    raise InputError(f"{key}: {path!r} holds no {INDEX}, so it is no diffusers pipeline (it holds: {names}). "
                     "Write a folder that save_pretrained made, or one .safetensors file.")


def config_root(file: Path, config: str | None) -> str:
    """The local folder with a single file's configs, if need be in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if config is not None and looks_local(config):
        return pipeline_root(config, "model.config")
    repository = config or usual_repository(file)
    cached = try_to_load_from_cache(repository, INDEX)
    if isinstance(cached, str):
        return str(Path(cached).parent)
    reason = f"the hub id {config!r} is" if config else f"{str(file)!r} belongs to the configs of {repository!r}, which are"
    raise InputError(f"model.config: {reason} not in the local cache, and of a single file nothing is downloaded. Write config: FOLDER, "
                     f"a local copy of that pipeline (its {INDEX}, configs and tokenizers suffice).")


def usual_repository(file: Path) -> str:
    """The hub repository whose configs diffusers takes for such a file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        shapes = {key: torch.empty(opened.get_slice(key).get_shape(), device="meta") for key in opened.keys()}  # noqa: SIM118
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def fetched(repository: str, name: str, folder: str | None = None) -> Path:
    """A file of a hub repository, from the local cache or downloaded into it."""
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, subfolder=folder))
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"model.path: there is no folder {repository!r} here, and of the hub's {repository!r} {name} is not in the local "
                         f"cache ({constants.HF_HUB_CACHE}) and cannot be fetched: {first_line(error)} Write a local folder "
                         "instead.") from error


def looks_local(path: str) -> bool:
    """Whether a path means something here rather than a hub id (org/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()


def is_local(root: str) -> bool:
    return Path(root).is_dir()


def expanded(path: str) -> str:
    """The folder that a local path means; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


# What the files hold


def keys_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def holds(file: Path, component: str) -> bool:
    """Whether a single file has weights of the component."""
    return any(key.startswith(PREFIXES.get(component, ())) for key in keys_of(file))


def variant_in(folder: Path) -> str | None:
    """What stands between name and ending of all weights here (fp16 in model.fp16.safetensors); None where some are plain."""
    names = [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    matches = [VARIANT.search(name) for name in names]
    return None if None in matches else min((match[1] for match in matches if match), default=None)


def mark(file: Path) -> str:
    """Size and a digest of pieces all over the file."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for i in range(PIECES):
            opened.seek(i * max(size - PIECE, 0) // (PIECES - 1))
            digest.update(opened.read(PIECE))
    return f"{size}:{digest.hexdigest()[:16]}"


# Refusals


def refuse_damaged(file: Path) -> None:
    """A .safetensors file that is cut short, or only a git-lfs pointer; its header and size are read, not its weights."""
    from safetensors import SafetensorError

    try:
        keys_of(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"model.path: {str(file)!r} is cut short or no .safetensors file ({first_line(error)}; a git clone without lfs "
                         "leaves such files). Fetch it again.") from error


def refuse_missing(names: list[str], component: str, where: str) -> None:
    if names:
        raise InputError(f"model.path: {where!r} lacks {len(names)} weight(s) of the {component}, such as {names[0]}, which would be drawn "
                         "anew. Write a path whose weights are complete and fit its config.")


@contextlib.contextmanager
def readable_errors(path: str, key: str = "model.path") -> Iterator[None]:
    """What a loader raises over missing or unfitting files, as an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise InputError(f"{key}: nothing can be loaded from {path!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
