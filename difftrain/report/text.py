"""Numbers, durations and recipe values as the text of a report."""

import json
import math
from typing import Any

import yaml

MISSING = "\N{EN DASH}"
LARGEST = 1e300  # numbers beyond it overflow in later arithmetic


def number(value: object) -> float:
    """Return a value from a log as a float.

    Args:
        value: Anything that JSON can hold.

    Returns:
        The number; NaN for null, text, booleans, and whatever else is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < LARGEST else math.nan


def numbers(values: object) -> list[float]:
    """Return a JSON list as floats, NaN for what is not a number; empty if it is not a list."""
    return [number(value) for value in values] if isinstance(values, list) else []


def shown(value: object, digits: int = 4) -> str:
    """Format a number with a few significant digits and thousands separators.

    Args:
        value: Anything that JSON can hold.
        digits: Number of significant digits.

    Returns:
        The text; a dash for what is not a finite number.
    """
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    if x.is_integer() or abs(x) >= 10**digits:
        return f"{x:,.0f}"
    return f"{x:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.3g} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def recipe_value(value: object) -> str:
    """Format a value of a recipe on one line, as YAML writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, dict | list):
        return str(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip()


def flat(value: Any, prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one mapping with dotted keys.

    Args:
        value: A mapping, or a leaf.
        prefix: The dotted key of `value` itself.
    """
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, object] = {}
    for name, child in value.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        leaves |= flat(child, key)
    return leaves
