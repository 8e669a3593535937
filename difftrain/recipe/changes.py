"""What may change in a recipe when its run resumes, and how changes are shown."""

import difflib
from collections.abc import Mapping
from typing import Any

from difftrain.core.registry import (
    Part,
    Section,
    parameters,
    slot_of,
    touches_training,
)
from difftrain.recipe.schema import Recipe
from difftrain.recipe.yaml_text import write_yaml

ABSENT = "(absent)"


def training_part(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe touches training, as plain data.

    `sampling` touches training if `prior` generates samples to train on. `loader.num_workers` is
    taken to touch it for streams, whose order is in the hands of whoever wrote the stream.
    """
    data = recipe.dump()
    found = pruned(data, Section(Recipe))
    if recipe.prior is not None:
        found["sampling"] = data["sampling"]
    if is_stream(recipe.data):
        found["loader"] = data["loader"]
    return found


def pruned(data: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """Leave out the keys of a section that do not touch training, in its inner sections too."""
    found = {}
    for name, parameter in parameters(section.constructors[""]).items():
        if name not in data or not touches_training(parameter):
            continue
        inner = slot_of(parameter)
        value = data[name]
        is_section = isinstance(inner, Section) and isinstance(value, dict)
        found[name] = pruned(value, inner) if is_section else value  # type: ignore[arg-type]
    return found


def is_stream(data: Part) -> bool:
    """Return whether a data block is a stream, as far as the block says so."""
    return bool(data.arguments.get("streaming", False))


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what differs between two dumped recipes, as a unified diff of their YAML."""
    before, after = (write_yaml(recipe).splitlines() for recipe in (old, new))
    lines = difflib.unified_diff(before, after, "of the run", "given now", lineterm="", n=1)
    return "\n".join(lines)


def flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    found: dict[str, Any] = {}
    for name, inner in data.items():
        found |= flattened(inner, f"{prefix}.{name}" if prefix else name)
    return found


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Return [before, after] of each dotted key that differs."""
    before, after = flattened(old), flattened(new)
    keys = dict.fromkeys([*before, *after])
    pairs = {key: [before.get(key, ABSENT), after.get(key, ABSENT)] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
