"""The files of a pretrained diffusers pipeline: a local folder, a hub id, or a single-file checkpoint with the folder of its configs.

Opening one reads names and configs; weights are read when a component is asked for. What is missing, damaged or of another family is an
InputError that says what to write instead. Of a single file nothing is ever downloaded.
"""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain.registry import InputError

INDEX = "model_index.json"
TYPES = {
    "StableDiffusionPipeline": "stable_diffusion", "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3", "FluxPipeline": "flux", "DiTPipeline": "dit",
}  # the recipe's model type that trains a pipeline's class
PREFIXES = {
    "unet": ("model.diffusion_model.", "down_blocks."),
    "transformer": ("model.diffusion_model.", "joint_blocks.", "double_blocks.", "transformer_blocks."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoders.t5xxl."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}  # how the keys of a component start in a single file: the original code's, then diffusers' own
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
PIECES, PIECE = 64, 4096  # of a weights file, in bytes, that tell it from others of its size


class PretrainedPipeline:
    """A diffusers pipeline's folder, hub id (org/name), or single .safetensors file.

    config: for a single file, the pipeline folder (or a hub id in the local cache) that holds its configs and tokenizers, and the
    components that the file lacks; without it, what the local cache has of the repository that diffusers takes for such a file.
    """

    def __init__(self, path: str, config: str | None = None):
        self.path, self.file = path, single_file(path)
        if self.file is None:
            if config is not None:
                raise InputError(f"model.config: {path!r} brings its own; config belongs to a single .safetensors file. Leave it out.")
            self.root = pipeline_root(path, "model.path")
        else:
            self.root = config_root(self.file, config)
        self.index = self._read(INDEX)
        if "_class_name" not in self.index:
            raise InputError(f"model.path: {INDEX} in {self.root!r} names no pipeline class (_class_name): diffusers did not save it.")
        self.pipeline_class: str = self.index["_class_name"]

    def has(self, component: str) -> bool:
        entry = self.index.get(component)  # [library, class]; [null, null] where a pipeline was saved without it
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json (of a scheduler, scheduler_config.json)."""
        self._refuse_absent(component)
        return self._read("scheduler_config.json" if component == "scheduler" else "config.json", component)

    def load(self, component: str, class_name: str | None = None, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
        """The component with its weights, in eval mode. class_name: another class than the index's; overrides go over its config."""
        constructor = self._constructor(component, class_name)
        with readable_errors(self.path, f"model.path ({component})"):
            if self.file is None or not holds(self.file, component):
                return self._load_from_folder(component, constructor, dtype, overrides).eval()
            try:
                return self._load_from_file(component, constructor, dtype, overrides).eval()
            except (KeyError, NotImplementedError) as error:  # a key that is not there, or a weight that stayed on the meta device
                raise InputError(f"model.path: {self.path!r} lacks weights that a {self.pipeline_class}'s {component} has "
                                 f"({first_line(error)}). Write a file that is complete, and as config the folder of a "
                                 "pipeline of its family.") from error

    def tokenizer(self, component: str) -> Any:
        """The component (tokenizer, tokenizer_2 ...) as transformers loads it."""
        constructor = self._constructor(component)
        folder = self._folder(component)
        if folder is not None and not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make one without words
            raise InputError(f"model.path: {str(folder)!r} holds no vocabulary ({', '.join(VOCABULARIES)}); "
                             "copy the pipeline's whole folder.")
        with readable_errors(self.path, f"model.path ({component})"):
            return constructor.from_pretrained(self.root, subfolder=component)

    def assembled(
        self, replaced: Mapping[str, Any] | None = None, only: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> Any:
        """A diffusers pipeline of the index's class. replaced: components to use in place of the pretrained ones; only: those that are
        loaded at all, the others are None; dtypes: of components that are not float32."""
        import diffusers

        given, components = dict(replaced or {}), [name for name in self.index if self.has(name)]
        wanted = [name for name in components if name not in given and (only is None or name in only)]
        own = dict(dtypes or {})
        in_file = [name for name in wanted if self.file is not None and holds(self.file, name)]
        given |= {name: self.load(name, dtype=own.get(name, torch.float32)) for name in in_file}
        given |= {name: None for name in components if name not in given and name not in wanted}
        given |= {name: None for name, entry in self.index.items() if isinstance(entry, list) and not self.has(name)}
        with readable_errors(self.path):
            return getattr(diffusers, self.pipeline_class).from_pretrained(self.root, dtype={**own, "default": torch.float32}, **given)

    def expect(self, pipeline_classes: Sequence[str], type_name: str) -> None:
        """Refuses a pipeline of another class than the recipe's model type trains."""
        if self.pipeline_class in pipeline_classes:
            return
        fitting = TYPES.get(self.pipeline_class)
        remedy = f"Write model: {{type: {fitting}}}" if fitting else f"Pipelines that can be trained: {', '.join(TYPES)}"
        raise InputError(f"model.path: {self.path!r} is a {self.pipeline_class}, and model.type {type_name} trains a "
                         f"{' or '.join(pipeline_classes)}. {remedy}.")

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others at the cost of a few kilobytes a file: of a hub id its commit, else size and samples."""
        if not is_local(self.root):
            return {"path": self.path, "commit": fetched(self.root, INDEX).parent.name}
        components = [name for name in self.index if self.has(name) and not (self.file and holds(self.file, name))]
        files = [file for name in components for file in sorted((Path(self.root) / name).glob("*"))]
        marks = {file.relative_to(self.root).as_posix(): mark(file) for file in files if file.suffix in (".safetensors", ".bin")}
        return {"path": self.path, "files": {self.file.name: mark(self.file), **marks} if self.file else marks}

    def _read(self, name: str, component: str | None = None) -> dict[str, Any]:
        folder = self._folder(component)
        file = fetched(self.root, name, component) if folder is None else folder / name
        if not file.is_file():
            raise InputError(f"model.path: {str(file.parent)!r} holds no {name}; write a folder that diffusers' save_pretrained made.")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"model.path: {str(file)!r} is not JSON ({error}); fetch or save it again.") from error

    def _folder(self, component: str | None = None) -> Path | None:
        """The local folder of a component, or of the whole; None for a hub id."""
        if not is_local(self.root):
            return None
        folder = Path(self.root) / (component or "")
        if not folder.is_dir():
            raise InputError(f"model.path: the pipeline in {self.root!r} lists a {component}, but there is no folder {component} in it; "
                             "copy the pipeline's whole folder.")
        return folder

    def _refuse_absent(self, component: str) -> None:
        if not self.has(component):
            known = ", ".join(name for name in self.index if self.has(name))
            raise InputError(f"model.path: the {self.pipeline_class} in {self.root!r} has no {component}; it has: {known}.")

    def _constructor(self, component: str, class_name: str | None = None) -> Any:
        self._refuse_absent(component)
        library, usual = self.index[component]
        name = class_name or usual
        if library not in ("diffusers", "transformers"):
            raise InputError(f"model.path: the {component} of {self.path!r} is a {library}.{usual}; only classes of diffusers and "
                             "transformers are loaded. Save the pipeline with one of theirs.")
        module = importlib.import_module(library)
        if not hasattr(module, name):
            raise InputError(f"model.path: the {component} of {self.path!r} is a {name}, which {library} {module.__version__} does not "
                             f"have; install a {library} that has it.")
        return getattr(module, name)

    def _load_from_folder(self, component: str, constructor: Any, dtype: torch.dtype, overrides: dict[str, Any]) -> Any:
        if (folder := self._folder(component)) is not None:
            for file in sorted(folder.glob("*.safetensors")):
                refuse_damaged(file)
        model, found = constructor.from_pretrained(self.root, subfolder=component, output_loading_info=True, dtype=dtype, **overrides)
        refuse_missing(sorted(found["missing_keys"]), component, self.root)
        return model

    def _load_from_file(self, component: str, constructor: Any, dtype: torch.dtype, overrides: dict[str, Any]) -> Any:
        import diffusers

        where = {"config": self.root, "local_files_only": True, "dtype": dtype}
        if self.index[component][0] == "transformers":  # text encoders are read by the pipeline's class, alone when the others are None
            assert not overrides, overrides
            others = {name: None for name, entry in self.index.items() if isinstance(entry, list) and name != component}
            safety = {"requires_safety_checker": False} if "requires_safety_checker" in self.index else {}
            pipeline = getattr(diffusers, self.pipeline_class)
            model = getattr(pipeline.from_single_file(str(self.file), **others, **safety, **where), component)
            model.tie_weights()  # T5's encoder shares its embedding, and a file may hold it once
        elif hasattr(constructor, "from_single_file"):
            model = constructor.from_single_file(str(self.file), subfolder=component, **where, **overrides)
        else:
            raise InputError(f"model.path: diffusers reads no {constructor.__name__} from a single file; write the pipeline's folder.")
        refuse_missing([name for name, value in model.state_dict().items() if value.is_meta], component, str(self.file))
        return model


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
        raise InputError(f"model.path: {name} of the hub's {repository!r} is not in the local cache ({constants.HF_HUB_CACHE}) and cannot "
                         f"be fetched: {first_line(error)} Write a local folder instead.") from error


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
