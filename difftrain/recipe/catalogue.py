"""Every registered part: its slot, name, arguments with defaults, formula and source.

All of it is read from the constructors themselves.
"""

import inspect
import re
import types
import typing
from typing import Any

from difftrain.core.registry import (
    Registry,
    Section,
    bounded_type,
    dump,
    is_given,
    parameters,
    slot_of,
)
from difftrain.data.items import DATASETS
from difftrain.diagnostics.base import DIAGNOSTICS
from difftrain.evaluation.slots import FEATURES, METRICS
from difftrain.generation.samplers import SAMPLERS
from difftrain.models.slots import ADAPTERS, ENCODERS, MODELS
from difftrain.objective.schedule import SCHEDULES
from difftrain.objective.slots import (
    ERRORS,
    NOISES,
    PERTURBATIONS,
    REGULARIZERS,
    TIMESTEPS,
    VARIANCES,
    WEIGHTINGS,
)
from difftrain.recipe.reading import import_modules
from difftrain.training.callbacks import CALLBACKS
from difftrain.training.ema import EMAS
from difftrain.training.lr import LEARNING_RATES

SLOTS: tuple[Registry, ...] = (
    SCHEDULES,
    TIMESTEPS,
    NOISES,
    PERTURBATIONS,
    ERRORS,
    VARIANCES,
    WEIGHTINGS,
    REGULARIZERS,
    MODELS,
    ADAPTERS,
    ENCODERS,
    DATASETS,
    LEARNING_RATES,
    EMAS,
    SAMPLERS,
    FEATURES,
    METRICS,
    DIAGNOSTICS,
    CALLBACKS,
)
# Sentences end at a full stop before a capital, or behind an arXiv number.
SENTENCE_END = re.compile(r"(?<=[.)])\s+(?=[A-Z])|(?<=arXiv:\d{4}\.\d{5}\.)\s+")
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
INDENT = " " * 22


def methods(imports: list[str]) -> list[dict[str, Any]]:
    """List every registered part.

    Args:
        imports: Modules of the user's own whose parts are listed too.

    Returns:
        One record a part: {"slot", "name", "formula", "source", "arguments": {name: {"type",
        "default", "required"}}}.
    """
    import_modules(imports, None)
    return [record(slot, name) for slot in SLOTS for name in slot.constructors]


def record(slot: Registry, name: str) -> dict[str, Any]:
    """Describe one part; its formula is the first paragraph of the constructor's docstring."""
    constructor = slot.constructors[name]
    docstring = inspect.cleandoc(constructor.__doc__ or "")
    first, _, _ = docstring.partition("\n\n")
    known = parameters(constructor).items()
    return {
        "slot": slot.slot,
        "name": name,
        "formula": " ".join(first.split()),
        "source": source(docstring),
        "arguments": {key: argument(p) for key, p in known if not is_given(p)},
    }


def source(docstring: str) -> str | None:
    """Return the source of a docstring: its Reference section, or a sentence with a year."""
    _, has_section, section = docstring.partition("\nReference:\n")
    if has_section:
        return " ".join(section.split("\n\n")[0].split())
    for sentence in SENTENCE_END.split(" ".join(docstring.split())):
        if re.search(r"arXiv:|\b(19|20)\d\d\b", sentence):
            return sentence
    return None


def argument(parameter: inspect.Parameter) -> dict[str, Any]:
    """Describe one argument: its type in words, whether it is required, and its default."""
    required = parameter.default is inspect.Parameter.empty
    slot = slot_of(parameter)
    if isinstance(slot, Registry):
        kind = slot.slot
    elif isinstance(slot, Section):
        kind = "section"
    else:
        kind = type_name(bounded_type(parameter))
    default = None if required else dump(parameter.default)
    return {"type": kind, "required": required, "default": default}


def type_name(annotation: Any) -> str:
    """Return an annotation as a person would write it: "float >= 0", "int >= 1 | None"."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        names = [type_name(kind) for kind in typing.get_args(annotation)]
        return " | ".join(names)
    if annotation is types.NoneType:
        return "None"
    metadata = getattr(annotation, "__metadata__", None)
    if metadata is None:
        name = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
        if typing.get_args(annotation):
            name = str(annotation)
        name = name.replace("typing.", "").replace("NoneType", "None")
        # Of a nested Annotated its type alone: "list[Annotated[int, ...]]" becomes "list[int]".
        return re.sub(r"Annotated\[(\w+),.*?\)\]\)?\]?", r"\1", name)
    bounds = [f"{sign} {bound:g}" for m in metadata for sign, bound in bounds_of(m)]
    return " ".join([type_name(annotation.__origin__), " and ".join(bounds)]).strip()


def bounds_of(metadata: Any) -> list[tuple[str, float]]:
    """Return the bounds that one piece of an annotation states, such as (">=", 0)."""
    found = []
    for one in getattr(metadata, "metadata", [metadata]):
        for name, sign in BOUNDS.items():
            value = getattr(one, name, None)
            if value is not None:
                found.append((sign, value))
    return found


def as_text(records: list[dict[str, Any]]) -> str:
    """Return the list for reading: a heading for each slot, and its parts."""
    lines: list[str] = []
    for slot in SLOTS:
        parts = [one for one in records if one["slot"] == slot.slot]
        if parts:
            lines += ["", f"{slot.slot}: {slot.purpose}"]
        for part in parts:
            lines.append(f"  {part['name']:<20}{part['formula']}")
            if part["source"]:
                lines.append(INDENT + part["source"])
            for name, found in part["arguments"].items():
                default = ", required" if found["required"] else f" = {found['default']}"
                lines.append(f"{INDENT}{name}: {found['type']}{default}")
    return "\n".join(lines).lstrip("\n")
