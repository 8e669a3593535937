"""The recipe: what a YAML file may say, and how it is read. Strict: every unknown, duplicate or wrong key is an error with its path.

The schema is the constructors' own signatures. Rules between blocks are in `plan.py`, which builds the parts.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from difftrain.cache import Cache
from difftrain.captions import Captions
from difftrain.data.buckets import Buckets
from difftrain.data.transform import Transform
from difftrain.objective import Objective
from difftrain.optimizers import Optimizer
from difftrain.parameterization import Parameterization
from difftrain.prior import Prior
from difftrain.registry import (
    ADAPTERS,
    ALL_DEFAULTS,
    DATASETS,
    DENOISERS,
    EMAS,
    ENCODERS,
    FEATURES,
    LEARNING_RATES,
    METRICS,
    SCHEDULES,
    InputError,
    NonNegativeInt,
    Part,
    PositiveInt,
    Section,
    UnitInterval,
    check_arguments,
    dump,
)
from difftrain.sampling import Sampling
from difftrain.trainer import Training


@dataclass(frozen=True)
class Loading:
    """num_workers: processes that read ahead; 0 reads in the training process. on_error: an unreadable image stops the run, or is
    replaced by the next readable one and recorded in skipped.jsonl."""

    num_workers: NonNegativeInt = 0
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class InLoop:
    """Evaluation during training. reference: real images of its own, not those of the final score. select: the score that picks
    the best checkpoint."""

    every: PositiveInt
    num_samples: PositiveInt
    reference: Annotated[Part, DATASETS]
    metrics: Annotated[list[Any], METRICS]
    select: str | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """The final scores: `num_samples` generated images against `reference`.

    memorization: the nearest training images are looked for too (nearest_neighbour_ratio), where the reference is not the training set.
    """

    features: Annotated[Part, FEATURES]
    reference: Annotated[Part, DATASETS]
    metrics: Annotated[list[Any], METRICS]
    num_samples: PositiveInt = 10_000
    in_loop: Annotated[Any | None, Section(InLoop)] = None
    seed: NonNegativeInt = 0
    memorization: bool = True


@dataclass(frozen=True)
class Validation:
    """The denoising loss on held-out images every so many steps, by noise level: `num` images of `data` at `num_timesteps` levels, always
    the same noise, with the averaged weights."""

    data: Annotated[Part, DATASETS]
    every: PositiveInt
    num: PositiveInt = 64
    num_timesteps: PositiveInt = 10


@dataclass(frozen=True)
class Recipe:
    """One run. schedule and parameterization may be left out when a pretrained model states them. license: that of the result, written
    into its files."""

    output: str
    model: Annotated[Part, DENOISERS]
    data: Annotated[Part, DATASETS]
    transform: Annotated[Part, Section(Transform)]
    training: Annotated[Part, Section(Training)]
    sampling: Annotated[Part, Section(Sampling)]
    seed: NonNegativeInt = 0
    imports: list[str] = field(default_factory=list)
    schedule: Annotated[Part | None, SCHEDULES] = None
    parameterization: Parameterization | None = None
    objective: Annotated[Part, Section(Objective)] = ALL_DEFAULTS
    adapter: Annotated[Part | None, ADAPTERS] = None
    label_dropout: UnitInterval = 0.0
    captions: Annotated[Part | None, Section(Captions)] = None
    cache: Annotated[Part | None, Section(Cache)] = None
    buckets: Annotated[Part | None, Section(Buckets)] = None
    encoder: Annotated[Part | None, ENCODERS] = None
    loader: Annotated[Part, Section(Loading)] = ALL_DEFAULTS
    optimizer: Annotated[Part, Section(Optimizer)] = ALL_DEFAULTS
    lr_schedule: Annotated[Part, LEARNING_RATES] = "constant"  # type: ignore[assignment]
    ema: Annotated[Part | None, EMAS] = None
    prior: Annotated[Part | None, Section(Prior)] = None
    validation: Annotated[Part | None, Section(Validation)] = None
    evaluation: Annotated[Part | None, Section(EvaluationSettings)] = None
    license: str | None = None

    def dump(self) -> dict[str, Any]:
        """Plain data with every default written out; it loads to this recipe again."""
        return {f.name: dump(getattr(self, f.name)) for f in fields(self)}

    def to_yaml(self) -> str:
        return write_yaml(self.dump())


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a file, with dotted overrides such as `training.steps=200`.

    Raises InputError with every problem found, each with the path of its key.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no recipe {str(path)!r}. Write the path of a YAML file, such as recipes/digits.yaml.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read: {error}. Expected a YAML file in UTF-8.") from error
    return parse(read_yaml(text, str(path)), overrides, folder=file.parent)


def parse(data: Any, overrides: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """A recipe from plain data. folder: where modules named under `imports` are also looked for, beside the working directory."""
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise InputError(f"a recipe is a mapping of keys such as output, model, data and training; this one is {found}.")
    for override in overrides:
        apply(data, override)
    register_everything()
    import_modules(data.get("imports", []), folder)
    return Recipe(**check_arguments(Recipe, data, ""))


def apply(data: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` (the value is YAML); blocks on the way are made, list items are addressed by number."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: expected key=value, such as training.steps=200.")
    *path, last = key.split(".")
    place: Any = data
    for name in path:
        at = key_in(place, name, override)
        inner = place[at] if isinstance(place, list) else place.get(at)
        if inner is None:
            inner = place[at] = {}
        if isinstance(inner, str):  # the short form of a block: {type: name}
            inner = place[at] = {"type": inner}
        if not isinstance(inner, (dict, list)):
            raise InputError(f"override {override!r}: {name!r} is not a block of the recipe.")
        place = inner
    place[key_in(place, last, override)] = read_yaml(text, override)


def key_in(place: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """The key that an override's `name` means: of a list, one of its places."""
    if isinstance(place, dict):
        return name
    if not name.isdecimal() or int(name) >= len(place):
        places = f"the places 0 to {len(place) - 1}" if place else "no places"
        raise InputError(f"override {override!r}: the list has {places}, got {name!r}.")
    return int(name)


def register_everything() -> None:
    """Import the modules whose parts recipes name."""
    rooms = ("timesteps", "noise", "regularizers", "denoisers", "pipelines.text_to_image", "adapters", "latents", "data", "ema", "sampling",
             "evaluation.features", "evaluation.inception", "evaluation.transformer_features", "evaluation.foreign_features",
             "evaluation.metrics", "diagnostics.denoising", "diagnostics.prediction", "diagnostics.exposure", "diagnostics.cumulative",
             "diagnostics.smoothness", "diagnostics.inversion")
    for module in rooms:
        importlib.import_module(f"difftrain.{module}")


def import_modules(names: Any, folder: Path | None) -> None:
    """Import the modules under `imports:`, whose registrations the recipe may then use; looked for here and in `folder` too."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"imports: expected a list of module names, such as [my_lab.my_method], got {names!r}.")
    for place in [os.getcwd(), *([str(folder)] if folder else [])]:
        if names and place not in sys.path:
            sys.path.append(place)
    for i, name in enumerate(names):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"imports.{i}: cannot import {name!r} ({error}). Install it, or put it beside the recipe.") from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two dumped recipes, as a unified diff of their YAML."""
    before, after = (write_yaml(recipe).splitlines() for recipe in (old, new))
    return "\n".join(difflib.unified_diff(before, after, "of the run", "given now", lineterm="", n=1))


class StrictLoader(yaml.SafeLoader):
    """YAML where a duplicate key is an error and 1e-4 is a number."""


def strict_mapping(loader: StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
    seen = set()
    for key_node, _ in node.value:
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key, Hashable):
            raise InputError(f"{mark.name}, line {mark.line + 1}: the key {key!r} is no name. Write key: value.")
        if key in seen:
            raise InputError(f"{mark.name}, line {mark.line + 1}: the key {key!r} is written twice. Keep one.")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


class StrictDumper(yaml.SafeDumper):
    """Writes what StrictLoader reads back: the string "1e-4" in quotes."""


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, strict_mapping)
for dialect in (StrictLoader, StrictDumper):
    dialect.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )


def write_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=StrictDumper, sort_keys=False, width=120)


def read_yaml(text: str, name: str) -> Any:
    """Plain data of YAML text; `name` is what errors call it."""
    loader = StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise InputError(f"{where}: not YAML: {getattr(error, 'problem', error)}.") from error
    except InputError:
        raise
    except ValueError as error:  # what looks like a date and is none
        raise InputError(f"{name}: not YAML: {error}. Write quotes around text that looks like a date.") from error
    finally:
        loader.dispose()
