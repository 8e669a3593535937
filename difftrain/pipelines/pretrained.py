"""A pretrained diffusers pipeline: a local folder, a hub id, or a single-file checkpoint with the folder of its configs.

Opening one reads names and configs; weights are read when a component is asked for. What is missing, damaged or of another family is an
InputError that says what to write instead. Of a single file nothing is ever downloaded.
"""

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain.pipelines.files import (
    INDEX,
    config_root,
    fetched,
    first_line,
    holds,
    is_local,
    mark,
    pipeline_root,
    readable_errors,
    refuse_damaged,
    refuse_missing,
    single_file,
    variant_in,
)
from difftrain.registry import InputError

TYPES = {
    "StableDiffusionPipeline": "stable_diffusion", "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3", "FluxPipeline": "flux", "DiTPipeline": "dit",
}  # the recipe's model type that trains a pipeline's class
OF_A_FILE = "Write a file that is complete, and as config the folder of a pipeline of its family."
LIBRARIES = ("diffusers", "transformers")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


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
            if not self._is_in_file(component):
                return self._load_from_folder(component, constructor, dtype, overrides).eval()
            try:
                return self._load_from_file(component, constructor, dtype, overrides).eval()
            except InputError:
                raise
            except (KeyError, NotImplementedError) as error:  # a key that is not there, or a weight that stayed on the meta device
                which = f" ({error})" if isinstance(error, KeyError) else ""
                raise InputError(f"model.path: {self.path!r} lacks weights that a {self.pipeline_class}'s {component} has{which}. "
                                 f"{OF_A_FILE}") from error
            except (ValueError, RuntimeError) as error:
                raise InputError(f"model.config: the {component} in {self.path!r} is another than that of the {self.pipeline_class} in "
                                 f"{self.root!r} ({first_line(error)}). {OF_A_FILE}") from error

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
        special = [name for name in wanted if self._is_in_file(name) or (self._variant(name) and self.index[name][0] in LIBRARIES)]
        given |= {name: self.load(name, dtype=own.get(name, torch.float32)) for name in special}
        given |= {name: None for name in components if name not in given and name not in wanted}
        given |= {name: None for name, entry in self.index.items() if isinstance(entry, list) and not self.has(name)}
        with readable_errors(self.path):
            variant = next((found for name in wanted if name not in special and (found := self._variant(name))), None)
            given |= {"variant": variant, "dtype": {**own, "default": torch.float32}}
            return getattr(diffusers, self.pipeline_class).from_pretrained(self.root, **given)

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
        components = [name for name in self.index if self.has(name) and not self._is_in_file(name)]
        files = [file for name in components for file in sorted((Path(self.root) / name).glob("*"))]
        marks = {file.relative_to(self.root).as_posix(): mark(file) for file in files if file.suffix in (".safetensors", ".bin")}
        return {"path": self.path, "files": {self.file.name: mark(self.file), **marks} if self.file else marks}

    def _is_in_file(self, component: str) -> bool:
        return self.file is not None and holds(self.file, component)

    def _variant(self, component: str) -> str | None:
        """That of a local component's weights, such as fp16, where there are no plain ones."""
        folder = self._folder(component)
        return None if folder is None else variant_in(folder)

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
        if library not in LIBRARIES:
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
        where = {"subfolder": component, "variant": self._variant(component)}
        model, found = constructor.from_pretrained(self.root, output_loading_info=True, dtype=dtype, **where, **overrides)
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
