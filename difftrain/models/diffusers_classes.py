"""Network classes of diffusers: their arguments, and building them from a config."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from difftrain.core.errors import InputError, nearest

Config = dict[str, Any]

# What diffusers raises over a config without sense.
REJECTIONS = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


def diffusers_class(class_name: str) -> Any:
    """Return a class of diffusers by its name."""
    import diffusers

    return getattr(diffusers, class_name)


def defaults_of(class_name: str) -> Config:
    """Return the arguments of a diffusers class with their defaults."""
    signature = inspect.signature(diffusers_class(class_name).__init__)
    parameters = signature.parameters.items()
    return {name: p.default for name, p in parameters if name != "self"}


def refuse_unknown(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse arguments that a diffusers class does not have.

    Args:
        class_name: The class.
        config: Its arguments; those that begin with an underscore are diffusers' own notes.

    Raises:
        InputError: With the nearest argument.
    """
    known = defaults_of(class_name)
    for key in config:
        if key not in known and not key.startswith("_"):
            raise InputError(
                f"model.config.{key}: {class_name} has no such argument{nearest(key, known)}."
            )


def built(class_name: str, config: Mapping[str, Any]) -> Any:
    """Return a network with new weights from torch's global generator.

    Args:
        class_name: The class in diffusers.
        config: Its arguments; those that begin with an underscore are diffusers' own notes.

    Raises:
        InputError: If the class does not take this config.
    """
    refuse_unknown(class_name, config)
    arguments = {}
    for key, value in config.items():
        if not key.startswith("_"):
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return diffusers_class(class_name)(**arguments)
    except REJECTIONS as error:
        raise InputError(f"model.config: {class_name} rejects it: {error}") from error


def by_sides(shape: Sequence[int]) -> str:
    """Return a shape as "3x32x32"."""
    return "x".join(map(str, shape))
