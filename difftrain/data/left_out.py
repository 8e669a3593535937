"""What of a data set is not read, and why: beside its items, or because they cannot be read."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class LeftOut(NamedTuple):
    """Something that is not read.

    Attributes:
        name: Its path, relative to the folder of the data set, or what a message calls it.
        reason: Why it is left out, in few words.
    """

    name: str
    reason: str


def in_words(left_out: Sequence[LeftOut]) -> str:
    """Say how many were left out for each reason, with the first of each; "" for none."""
    return "; ".join(f"{count:,} ({why}; {first})" for why, count, first in grouped(left_out))


def account(num_read: int, left_out: Sequence[LeftOut]) -> str:
    """Return a table for people: what is read, and what is left out for which reason.

    Args:
        num_read: How many items are read.
        left_out: What is not read.
    """
    num = len(left_out)
    items = "item is" if num_read == 1 else "items are"
    are = "is" if num == 1 else "are"
    lines = [f"{num_read:,} {items} read, {num:,} {are} left out"]
    for reason, count, first in grouped(left_out):
        lines.append(f"{count:>7,}  {reason} (the first: {first})")
    return "\n".join(lines)


def grouped(left_out: Sequence[LeftOut]) -> list[tuple[str, int, str]]:
    """Return reason, number and first name of each kind, the most frequent first."""
    reasons = [without_details(one.reason) for one in left_out]
    first: dict[str, str] = {}
    for reason, one in zip(reasons, left_out, strict=True):
        first[reason] = min(first.get(reason, one.name), one.name)
    counts = sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0]))
    return [(reason, count, in_one_line(first[reason])) for reason, count in counts]


def in_one_line(name: str) -> str:
    """Return a name with escapes for what is no printable character, such as a line break."""
    return name if name.isprintable() else ascii(name)[1:-1]


def without_details(reason: str) -> str:
    """Return a reason without what differs from file to file: numbers, and what is in brackets."""
    return re.sub(r"\d+", "N", re.sub(r"\s*\(.*\)", "", reason)) if "cannot" in reason else reason
