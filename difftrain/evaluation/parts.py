"""What a protocol calls a part, whether it is registered or not."""

from typing import Any

from difftrain.core.registry import dump, is_registered


def part_block(part: Any) -> Any:
    """Describe a part as plain data.

    Returns:
        The recipe block of a registered part; the name of its class for any other object.
    """
    return dump(part) if is_registered(part) else type(part).__name__
