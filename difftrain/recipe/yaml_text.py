"""Strict YAML: a duplicate key is an error, and 1e-4 is a number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from difftrain.core.errors import InputError

FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?"
    r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class StrictLoader(yaml.SafeLoader):
    """Reads YAML in which a duplicate key is an error and 1e-4 is a number."""


class StrictDumper(yaml.SafeDumper):
    """Writes YAML that `StrictLoader` reads back: the string "1e-4" stands in quotes."""


def strict_mapping(
    loader: StrictLoader, node: yaml.MappingNode, deep: bool = False
) -> dict[Hashable, Any]:
    """Construct a mapping, and refuse keys that are not names or are written twice."""
    seen = set()
    for key_node, _ in node.value:
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        where = f"{mark.name}, line {mark.line + 1}"
        if not isinstance(key, Hashable):
            raise InputError(f"{where}: the key {key!r} is not a name. Write key: value.")
        if key in seen:
            raise InputError(f"{where}: the key {key!r} is written twice. Keep one.")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, strict_mapping)
for dialect in (StrictLoader, StrictDumper):
    dialect.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def write_yaml(data: Any) -> str:
    """Return plain data as YAML text."""
    return yaml.dump(data, Dumper=StrictDumper, sort_keys=False, width=120)


def read_yaml(text: str, name: str) -> Any:
    """Return the plain data of YAML text.

    Args:
        text: The text.
        name: What errors call it, such as the file's path.

    Raises:
        InputError: If the text is not valid YAML, or not strict.
    """
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
    except ValueError as error:  # text that looks like a date and is none
        raise InputError(
            f"{name}: not YAML: {error}. Write quotes around text that looks like a date."
        ) from error
    finally:
        loader.dispose()
