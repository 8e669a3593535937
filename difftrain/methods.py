"""Every registered part: its slot, name, arguments with defaults, formula and source, read from the constructors themselves."""

import inspect
import re
import types
import typing
from typing import Any

from difftrain import registry
from difftrain.recipe import import_modules, register_everything
from difftrain.registry import Registry, Section, dump, is_given, parameters, slot_of

SLOTS = [value for value in vars(registry).values() if isinstance(value, Registry)]


def methods(imports: list[str]) -> list[dict[str, Any]]:
    """One record a part: {"slot", "name", "formula", "source", "arguments": {name: {"type", "default", "required"}}}."""
    register_everything()
    import_modules(imports, None)
    return [record(slot, name) for slot in SLOTS for name in slot.constructors]


def record(slot: Registry, name: str) -> dict[str, Any]:
    constructor = slot.constructors[name]
    first, _, rest = inspect.cleandoc(constructor.__doc__ or "").partition("\n\n")
    sentences = re.split(r"(?<=[.)])\s+(?=[A-Z])|(?<=arXiv:\d{4}\.\d{5}\.)\s+", " ".join(rest.split()))
    source = next((sentence for sentence in sentences if re.search(r"arXiv:|\b(19|20)\d\d\b", sentence)), None)
    arguments = {key: argument(p) for key, p in parameters(constructor).items() if not is_given(p)}
    return {"slot": slot.slot, "name": name, "formula": " ".join(first.split()), "source": source, "arguments": arguments}


def argument(parameter: inspect.Parameter) -> dict[str, Any]:
    required = parameter.default is inspect.Parameter.empty
    slot = slot_of(parameter)
    kind = slot.slot if isinstance(slot, Registry) else "section" if isinstance(slot, Section) else type_name(parameter.annotation)
    return {"type": kind, "required": required, "default": None if required else dump(parameter.default)}


def type_name(annotation: Any) -> str:
    """An annotation as a person would write it, with its bounds: `float >= 0`, `int >= 1 | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join("None" if kind is types.NoneType else type_name(kind) for kind in typing.get_args(annotation))
    bounds = [f"{sign} {bound:g}" for m in getattr(annotation, "__metadata__", ()) for sign, bound in bounds_of(m)]
    base = getattr(annotation, "__origin__", annotation) if bounds else annotation
    name = base.__name__ if inspect.isclass(base) else str(base).replace("typing.", "").replace("NoneType", "None")
    name = re.sub(r"Annotated\[(\w+),.*?\)\]\)?\]?", r"\1", name)
    return " ".join([name, " and ".join(bounds)]).strip()


def bounds_of(metadata: Any) -> list[tuple[str, float]]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = list(getattr(metadata, "metadata", [metadata]))
    return [(sign, value) for m in found for name, sign in signs.items() if (value := getattr(m, name, None)) is not None]


def as_text(records: list[dict[str, Any]]) -> str:
    """The list for reading: slots as headings, a part with its formula, source and arguments."""
    lines: list[str] = []
    for slot in SLOTS:
        of_slot = [r for r in records if r["slot"] == slot.slot]
        lines += ["", f"{slot.slot}: {slot.purpose}"] if of_slot else []
        for part in of_slot:
            lines += [f"  {part['name']:<20}{part['formula']}"]
            if part["source"]:
                lines += [" " * 22 + part["source"]]
            for name, a in part["arguments"].items():
                lines += [" " * 22 + f"{name}: {a['type']}" + (", required" if a["required"] else f" = {a['default']}")]
    return "\n".join(lines).lstrip("\n")
