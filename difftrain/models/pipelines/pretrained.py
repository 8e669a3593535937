"""A pretrained diffusers pipeline: a local folder, a hub id, or a single file with its configs.

Opening one reads names and configs; weights are read when a component is asked for. What is
missing, damaged or of another family is an InputError. For a single file nothing is downloaded.
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from difftrain.core.errors import InputError
from difftrain.models.files import (
    INDEX,
    WEIGHTS,
    config_root,
    fetched,
    first_line,
    has_keys,
    is_local,
    keys_of,
    mark,
    pipeline_root,
    read_json,
    readable_errors,
    refuse_damaged,
    refuse_missing,
    single_file,
    variant_in,
)
from difftrain.models.model import models

OF_A_FILE = "Write a file that is complete, and as config the folder of a pipeline of its family."
KeyPrefixes = Mapping[str, Sequence[str]]
LIBRARIES = ("diffusers", "transformers")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


class PretrainedPipeline:
    """A diffusers pipeline's folder, hub id (org/name), or single .safetensors file.

    Args:
        path: Which one.
        config: For a single file, the pipeline folder (or hub id in the local cache) with its
            configs and tokenizers, and with the components that the file lacks. Without it, what
            the local cache has of the repository that diffusers takes for such a file.
        key_prefixes: How the keys of each component begin in a single file.

    Attributes:
        index: The content of model_index.json.
        pipeline_class: The pipeline's class in diffusers.

    Raises:
        InputError: If there is no such pipeline.
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        key_prefixes: KeyPrefixes | None = None,
    ):
        self.path = path
        self.key_prefixes = key_prefixes or {}
        self.file = single_file(path)
        if self.file is None:
            if config is not None:
                raise InputError(
                    f"model.config: {path!r} brings its own; config belongs to a single "
                    ".safetensors file. Leave it out."
                )
            self.root = pipeline_root(path, "model.path")
        else:
            self._refuse_other_content(self.file)
            self.root = config_root(self.file, config)
        self.index = self._read(INDEX)
        if "_class_name" not in self.index:
            raise InputError(
                f"model.path: {INDEX} in {self.root!r} names no pipeline class (_class_name): "
                "diffusers did not save it. Write a folder that save_pretrained made."
            )
        self.pipeline_class: str = self.index["_class_name"]

    def has(self, component: str) -> bool:
        """Return whether the pipeline has a component."""
        entry = self.index.get(component)
        # [library, class]; [null, null] where a pipeline was saved without it.
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config.json, or a scheduler's scheduler_config.json.

        Raises:
            InputError: If the pipeline has no such component, or its config is missing.
        """
        self._refuse_absent(component)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self._read(name, component)

    def load(
        self,
        component: str,
        class_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Any:
        """Return a component with its weights, in eval mode.

        Args:
            component: Its name.
            class_name: A class to use in place of the index's.
            dtype: The precision of the weights.
            overrides: Go over its config.

        Raises:
            InputError: If weights are missing, damaged, or do not fit the config.
        """
        constructor = self._constructor(component, class_name)
        with readable_errors(self.path, f"model.path ({component})"):
            if self._is_in_file(component):
                model = self._load_from_file(component, constructor, dtype, overrides)
            else:
                model = self._load_from_folder(component, constructor, dtype, overrides)
            return model.eval()

    def tokenizer(self, component: str) -> Any:
        """Return a tokenizer (tokenizer, tokenizer_2 ...) as transformers loads it.

        Raises:
            InputError: If its vocabulary is missing.
        """
        constructor = self._constructor(component)
        folder = self._folder(component)
        if folder is not None:
            refuse_wordless(folder)
        with readable_errors(self.path, f"model.path ({component})"):
            return constructor.from_pretrained(self.root, subfolder=component)

    def assembled(
        self,
        replaced: Mapping[str, Any] | None = None,
        only: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> Any:
        """Return a diffusers pipeline of the index's class.

        Args:
            replaced: Components to use in place of the pretrained ones.
            only: The components to load; the others are None. Without it all are loaded.
            dtypes: The precision of components that are not float32.

        Raises:
            InputError: If a component cannot be loaded.
        """
        import diffusers

        precision = dict(dtypes or {})
        given = dict(replaced or {})
        entries = [name for name, entry in self.index.items() if isinstance(entry, list)]
        wanted = []
        for name in entries:
            is_wanted = only is None or name in only
            if name not in given and is_wanted and self.has(name):
                wanted.append(name)
            else:
                given.setdefault(name, None)

        # diffusers takes one variant for all components, and reads no single file here.
        variant: str | None = None
        for name in wanted:
            in_library = self.index[name][0] in LIBRARIES
            if self._is_in_file(name) or (in_library and self._variant(name)):
                given[name] = self.load(name, dtype=precision.get(name, torch.float32))
            elif variant is None:
                variant = self._variant(name)
        with readable_errors(self.path):
            return getattr(diffusers, self.pipeline_class).from_pretrained(
                self.root,
                variant=variant,
                dtype={**precision, "default": torch.float32},
                **given,
            )

    def expect(self, pipeline_class: str, type_name: str) -> None:
        """Refuse a pipeline of another class.

        Args:
            pipeline_class: The class that is expected.
            type_name: The recipe's model type that trains it.

        Raises:
            InputError: With the model type that trains this pipeline, if there is one.
        """
        if self.pipeline_class == pipeline_class:
            return
        known = types_by_pipeline()
        remedy = f"Pipelines that can be trained: {', '.join(known)}"
        if self.pipeline_class in known:
            remedy = f"Write model: {{type: {known[self.pipeline_class]}}}"
        raise InputError(
            f"model.path: {self.path!r} is a {self.pipeline_class}, and model.type {type_name} "
            f"trains a {pipeline_class}. {remedy}."
        )

    def identity(self) -> dict[str, Any]:
        """Return what tells these weights from others, at the cost of a few kilobytes a file.

        Returns:
            The commit of a hub id; else for each file its size and a digest of samples.
        """
        if not is_local(self.root):
            return {"path": self.path, "commit": fetched(self.root, INDEX).parent.name}
        marks = {}
        if self.file is not None:
            marks[self.file.name] = mark(self.file)
        for name in self.index:
            if not self.has(name) or self._is_in_file(name):
                continue
            for file in sorted((Path(self.root) / name).glob("*")):
                if file.suffix in WEIGHTS:
                    marks[file.relative_to(self.root).as_posix()] = mark(file)
        return {"path": self.path, "files": marks}

    # What is where

    def _refuse_other_content(self, file: Path) -> None:
        if any(has_keys(file, prefixes) for prefixes in self.key_prefixes.values()):
            return
        first = min(keys_of(file), default="none")
        raise InputError(
            f"model.path: {self.path!r} holds no model of a pipeline (its first key: {first!r}). "
            "Write a checkpoint's file, or a pipeline's folder. A LoRA goes onto the model that it "
            "was trained on."
        )

    def _is_in_file(self, component: str) -> bool:
        prefixes = self.key_prefixes.get(component, ())
        return self.file is not None and has_keys(self.file, prefixes)

    def _variant(self, component: str) -> str | None:
        """The variant of a local component's weights, such as fp16, where there are no others."""
        folder = self._folder(component)
        return None if folder is None else variant_in(folder)

    def _read(self, name: str, component: str | None = None) -> dict[str, Any]:
        folder = self._folder(component)
        file = fetched(self.root, name, component) if folder is None else folder / name
        if not file.is_file():
            raise InputError(
                f"model.path: {str(file.parent)!r} holds no {name}. Write a folder that diffusers' "
                "save_pretrained made."
            )
        return read_json(file)

    def _folder(self, component: str | None = None) -> Path | None:
        """The local folder of a component, or of the whole pipeline; None for a hub id."""
        if not is_local(self.root):
            return None
        folder = Path(self.root) / (component or "")
        if not folder.is_dir():
            raise InputError(
                f"model.path: the pipeline in {self.root!r} lists a {component}, but there is no "
                f"folder {component} in it. Copy the pipeline's whole folder."
            )
        return folder

    def _refuse_absent(self, component: str) -> None:
        if not self.has(component):
            known = ", ".join(name for name in self.index if self.has(name))
            raise InputError(
                f"model.path: the {self.pipeline_class} in {self.root!r} has no {component}; it "
                f"has: {known}. Write a pipeline that has one."
            )

    def _constructor(self, component: str, class_name: str | None = None) -> Any:
        self._refuse_absent(component)
        library, usual = self.index[component]
        name = class_name or usual
        if library not in LIBRARIES:
            raise InputError(
                f"model.path: the {component} of {self.path!r} is a {library}.{usual}; only "
                "classes of diffusers and transformers are loaded. Save the pipeline with one of "
                "theirs."
            )
        module = importlib.import_module(library)
        if not hasattr(module, name):
            raise InputError(
                f"model.path: the {component} of {self.path!r} is a {name}, which {library} "
                f"{module.__version__} does not have; install a {library} that has it."
            )
        return getattr(module, name)

    # Loading

    def _load_from_folder(
        self, component: str, constructor: Any, dtype: torch.dtype, overrides: dict[str, Any]
    ) -> Any:
        folder = self._folder(component)
        if folder is not None:
            for file in sorted(folder.glob("*.safetensors")):
                refuse_damaged(file)
        model, found = constructor.from_pretrained(
            self.root,
            subfolder=component,
            variant=self._variant(component),
            dtype=dtype,
            output_loading_info=True,
            **overrides,
        )
        refuse_missing(sorted(found["missing_keys"]), component, self.root)
        return model

    def _load_from_file(
        self, component: str, constructor: Any, dtype: torch.dtype, overrides: dict[str, Any]
    ) -> Any:
        try:
            return self._read_from_file(component, constructor, dtype, overrides)
        except InputError:
            raise
        except (KeyError, NotImplementedError) as error:
            # A key that is not there, or a weight that stayed on the meta device.
            which = f" ({error})" if isinstance(error, KeyError) else ""
            raise InputError(
                f"model.path: {self.path!r} lacks weights that a {self.pipeline_class}'s "
                f"{component} has{which}. {OF_A_FILE}"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"model.config: the {component} in {self.path!r} differs from that of the "
                f"{self.pipeline_class} in {self.root!r} ({first_line(error)}). {OF_A_FILE}"
            ) from error

    def _read_from_file(
        self, component: str, constructor: Any, dtype: torch.dtype, overrides: dict[str, Any]
    ) -> Any:
        options = {"config": self.root, "local_files_only": True, "dtype": dtype}
        if self.index[component][0] == "transformers":
            assert not overrides, overrides
            model = self._text_encoder_from_file(component, options)
        elif hasattr(constructor, "from_single_file"):
            model = constructor.from_single_file(
                str(self.file), subfolder=component, **options, **overrides
            )
        else:
            raise InputError(
                f"model.path: diffusers reads no {constructor.__name__} from a single file. Write "
                "the pipeline's folder."
            )
        missing = [name for name, value in model.state_dict().items() if value.is_meta]
        refuse_missing(missing, component, str(self.file))
        return model

    def _text_encoder_from_file(self, component: str, options: Mapping[str, Any]) -> Any:
        """The pipeline's class reads text encoders, alone when the other components are None."""
        import diffusers

        others: dict[str, Any] = {}
        for name, entry in self.index.items():
            if isinstance(entry, list) and name != component:
                others[name] = None
        if "requires_safety_checker" in self.index:
            others["requires_safety_checker"] = False
        pipeline = getattr(diffusers, self.pipeline_class)
        model = getattr(pipeline.from_single_file(str(self.file), **others, **options), component)
        # T5's encoder shares its embedding, and a file may hold it once.
        model.tie_weights()
        return model


def refuse_wordless(folder: Path) -> None:
    """Refuse a tokenizer's folder without a vocabulary, of which transformers makes a tokenizer.

    Args:
        folder: The local folder of the tokenizer.

    Raises:
        InputError: If no file with a vocabulary is there.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(
            f"model.path: {str(folder)!r} holds no vocabulary ({', '.join(VOCABULARIES)}). Copy "
            "the pipeline's whole folder."
        )


def types_by_pipeline() -> dict[str, str]:
    """Return the model types of recipes by the class of the diffusers pipeline that they train."""
    return {model.pipeline_class: name for name, model in models().items() if model.pipeline_class}
