"""What lies beside the items of a data set and is not read, and why."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class LeftOut(NamedTuple):
    """Something below a folder that is not an item of the data set.

    Attributes:
        name: Its path, relative to the folder.
        reason: Why it is left out, in few words.
    """

    name: str
    reason: str


def in_words(left_out: Sequence[LeftOut]) -> str:
    """Say how many were left out for each reason, with the first of each; "" for none."""
    counts = Counter(one.reason for one in left_out)
    first: dict[str, str] = {}
    for one in left_out:
        first.setdefault(one.reason, one.name)
    return "; ".join(f"{count:,} ({why}; {first[why]})" for why, count in counts.most_common())
