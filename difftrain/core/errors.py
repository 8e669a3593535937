"""`InputError` for what a user can correct, and the exit codes of the commands."""

import difflib
from collections.abc import Iterable
from enum import IntEnum


class InputError(ValueError):
    """Something that a user wrote, or that lies on a disk, is wrong.

    The message says what was given, what was expected, and what to write instead.
    """


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    STOPPED = 75  # by a signal, after saving: the same command goes on


def nearest(name: str, known: Iterable[object]) -> str:
    """Describe the known names, beginning with the one that `name` probably means.

    Args:
        name: An unknown name.
        known: The names that would have been accepted.

    Returns:
        Text such as " (did you mean 'cosine'?); known: cosine, linear".
    """
    names = [str(one) for one in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; known: {', '.join(sorted(names)) or 'none'}"
