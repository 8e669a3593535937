"""Reading a recipe: YAML, overrides, and modules of the user's own."""

import importlib
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.core.registry import check_arguments
from difftrain.recipe.schema import Recipe
from difftrain.recipe.yaml_text import read_yaml


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    blocks: Collection[str] | None = None,
    imports: Path | None = None,
) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: A YAML file.
        overrides: Dotted changes, such as "training.steps=200".
        blocks: Names of the top-level blocks that are checked; the others are kept as plain data.
            None checks all of them.
        imports: Where modules named under `imports` are also looked for; None: beside the file.

    Raises:
        InputError: With every problem found, each with the path of its key.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"there is no recipe {str(path)!r}. Write the path of a YAML file, such as "
            "recipes/digits.yaml."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the recipe {str(path)!r} cannot be read: {error}. Expected a YAML file in UTF-8."
        ) from error
    return parse(
        read_yaml(text, str(path)), overrides, folder=imports or file.parent, blocks=blocks
    )


def parse(
    data: Any,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    blocks: Collection[str] | None = None,
) -> Recipe:
    """Check plain data as a recipe.

    Args:
        data: A mapping, as YAML gives it.
        overrides: Dotted changes, such as "training.steps=200".
        folder: Where modules named under `imports` are also looked for.
        blocks: As for `load`; blocks that overrides change are checked too.

    Raises:
        InputError: With every problem found, each with the path of its key.
    """
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise InputError(
            "a recipe is a mapping of keys such as output, model, data and training; this one is "
            f"{found}."
        )
    for override in overrides:
        apply(data, override)
    import_modules(data.get("imports", []), folder)
    left: frozenset[str] = frozenset()
    if blocks is not None:
        changed = {override.partition("=")[0].split(".")[0] for override in overrides}
        left = frozenset(f.name for f in fields(Recipe)) - set(blocks) - changed
    return Recipe(**check_arguments(Recipe, data, "", leave=left))


def apply(data: dict[str, Any], override: str) -> None:
    """Set one key of plain data.

    Args:
        data: A recipe as plain data, which is changed.
        override: "a.b.c=value", where the value is YAML. Missing blocks are added, and items of
            lists are addressed by number.

    Raises:
        InputError: If the override does not name a place in the recipe.
    """
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
            raise InputError(
                f"override {override!r}: {name!r} is {inner!r}, which has no keys below it. Write "
                "the name of a block."
            )
        place = inner
    place[key_in(place, last, override)] = read_yaml(text, override)


def key_in(place: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """Return the key that a name in an override means: in a list, one of its places."""
    if isinstance(place, dict):
        return name
    if not name.isdecimal() or int(name) >= len(place):
        places = f"the places 0 to {len(place) - 1}" if place else "no places"
        raise InputError(f"override {override!r}: the list has {places}, got {name!r}.")
    return int(name)


def import_modules(names: Any, folder: Path | None) -> None:
    """Import modules of the user's own, whose registered parts a recipe may then name.

    Args:
        names: Module names, looked for in the working directory and in `folder` too.
        folder: A further folder, such as that of the recipe.

    Raises:
        InputError: If a module, or one that it imports, is not found.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"imports: expected a list of module names, such as [my_lab.my_method], got {names!r}."
        )
    places = [os.getcwd(), *([] if folder is None else [str(folder)])]
    for place in places:
        if names and place not in sys.path:
            sys.path.append(place)
    for i, name in enumerate(names):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"imports.{i}: cannot import {name!r} ({error}). Install the missing module, or "
                "put it into the folder of the recipe."
            ) from error
