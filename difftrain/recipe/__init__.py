"""Recipes: what a YAML file may say, how it is read, and every part that it can name."""

import importlib
from typing import Any

HOMES = {
    "Recipe": "difftrain.recipe.schema",
    "load": "difftrain.recipe.reading",
    "parse": "difftrain.recipe.reading",
}

__all__ = ["Recipe", "load", "parse"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
